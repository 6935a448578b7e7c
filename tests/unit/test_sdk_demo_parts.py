"""The demo's judgement, reward, data and page, without a server."""

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from tinkerbell.demo import crowd, data
from tinkerbell.demo.bill import Answer
from tinkerbell.demo.byte_tokenizer import ByteTokenizer
from tinkerbell.demo.display import CURVE, curve, table
from tinkerbell.demo.page import page
from tinkerbell.demo.track import Measure, Point, Track
from tinkerbell.demo.users import USERS, brevity
from tinkerbell.demo.verdict import judge
from tinkerbell.sdk import from_chat, from_text


def track(measure: Measure, values: Sequence[float], error: str = "") -> Track:
    points = [Point(float(n), value) for n, value in enumerate(values)]
    return Track(user="u", task="t", lora="l", measure=measure, num_steps=len(values) or 3, points=points, error=error)


@pytest.mark.parametrize(
    ("measure", "values", "passed"),
    [
        ("loss", [4.0, 3.0, 2.0, 1.0, 0.5], True),
        ("loss", [4.0, 4.1, 3.9, 4.0, 3.9], False),
        ("loss", [1.0, 2.0, 3.0], False),
        ("reward", [0.1, 0.2, 0.5], True),
        ("reward", [0.5, 0.5, 0.55], False),
        ("reward", [0.9, 0.1], False),
        ("loss", [4.0], False),
        ("loss", [], False),
        ("loss", [4.0, float("nan")], False),
        ("reward", [0.1, float("nan")], False),
    ],
)
def test_only_what_moved_the_right_way_passes(measure: Measure, values: list[float], passed: bool) -> None:
    assert judge(track(measure, values)).passed is passed


def test_a_script_that_failed_does_not_pass_and_says_why() -> None:
    verdict = judge(track("loss", [4.0, 1.0], error="NotFound: gone"))
    assert not verdict.passed
    assert "gone" in verdict.text


def test_of_a_toy_model_only_the_steps_are_asked() -> None:
    assert judge(track("loss", [4.0, 4.0, 4.0]), toy=True).passed
    unfinished = track("loss", [4.0, 4.0])
    unfinished.num_steps = 3
    assert not judge(unfinished, toy=True).passed


@pytest.mark.parametrize(("answer", "reward"), [("Red.", 1.0), ("", 0.0), ("  ", 0.0), ("a " * 7, 0.5), ("a " * 30, 0)])
def test_brevity_is_rewarded_and_silence_is_not(answer: str, reward: float) -> None:
    assert brevity(answer) == pytest.approx(reward)


def test_the_data_sets_are_whole() -> None:
    for name, fields in (
        ("keeper", {"question", "answer"}),
        ("orders", {"text", "record"}),
        ("topics", {"message", "topic"}),
    ):
        rows = data.rows(name)
        assert len(rows) >= 24
        assert all(row.keys() == fields for row in rows)
        assert len({str(row) for row in rows}) == len(rows)
    for row in data.rows("orders"):
        parts = dict(part.split("=") for part in row["record"].split(";"))
        assert list(parts) == ["item", "count", "unit", "to", "due"]
        assert all(parts[name] in row["text"] for name in ("item", "count", "unit", "to", "due"))
    assert {row["topic"] for row in data.rows("topics")} == {"delivery", "billing", "product", "account"}


def test_bytes_are_tokens() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("Ahoy")) == "Ahoy"
    assert from_text(tokenizer, "ab", "c").targets == [98, 99, 0]
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert sum(from_chat(tokenizer, conversation).loss_inputs["weights"]) == 3


def test_a_curve_is_as_high_as_its_values() -> None:
    assert curve([0.0, 1.0]) == "▁█"
    assert curve([]) == ""
    assert curve([0.0, 0.0]) == "▁▁"
    assert curve([-1.0, 2.0]) == "▁█"
    assert curve([0.0] * 50 + [1.0] * 50) == "▁" * (CURVE // 2) + "█" * (CURVE // 2)


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_table_fits_its_terminal(width: int) -> None:
    tracks = crowd.tracks_of(USERS, 100)
    for run in tracks:
        run.points = [Point(float(n), 1.0 + n) for n in range(100)]
        run.tokens, run.cost_us = 123_456, 1_234_500_000
    console = Console(width=width, file=io.StringIO())
    measured = table(tracks, width).__rich_measure__(console, console.options)
    assert measured.minimum <= width
    console.print(table(tracks, width))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text
    assert "1,234.5" in text


def test_the_page_shows_text_as_text() -> None:
    run = track("loss", [2.0, 1.0])
    run.before, run.after = [("<b>p</b>", "x")], [("<b>p</b>", "<script>y</script>")]
    text = page([run], [judge(run)], [Answer("SELECT '<i>'", ["a<b"], [[1]])], "<svg></svg>", "1 < 2")
    assert "<script>" not in text
    assert "&lt;script&gt;y" in text
    assert "SELECT &#x27;&lt;i&gt;&#x27;" in text
    assert "a&lt;b" in text
