"""The decisions of a replay, without a log and without an executor."""

import math
import struct
import sys

import msgspec
import pytest

from tests.support import log
from tinkerbell.errors import InvalidRequest, MissingPackage
from tinkerbell.executors.port import Environment
from tinkerbell.replay import plot
from tinkerbell.replay.curves import per_token
from tinkerbell.replay.findings import Finding, mean_difference
from tinkerbell.replay.fork import parse_settings
from tinkerbell.replay.integrity import ran_whole
from tinkerbell.replay.session import ExecutorChoice
from tinkerbell.scheduler.environments import differences, relative, tolerance_of
from tinkerbell.types import AdamParams

RECORDED = log.examples()["environment.recorded"][0]
CHUNKS = [(0, 2), (2, 3), (3, 5)]


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


@pytest.mark.parametrize(
    ("planned", "whole"),
    [
        (CHUNKS, True),
        (CHUNKS[:2] + CHUNKS, True),
        (CHUNKS + CHUNKS, True),
        ([CHUNKS[0], CHUNKS[1], CHUNKS[1], CHUNKS[2]], True),
        (CHUNKS[:2], False),
        (CHUNKS[1:], False),
        ([CHUNKS[0], CHUNKS[2], CHUNKS[1]], False),
        ([*CHUNKS, CHUNKS[0]], False),
        ([], False),
    ],
)
def test_the_last_pass_over_a_request_is_whole(planned, whole):
    assert ran_whole(planned, CHUNKS) is whole


def test_environments_differ_by_facts_and_not_by_where_the_model_lies():
    here = Environment(
        executor="fake",
        model=msgspec.structs.replace(RECORDED.model, name="elsewhere", tokenizer="/elsewhere"),
        exact=True,
        facts={"threads": "2", "dtype": "float32"},
    )
    assert differences(RECORDED, here) == []
    other = msgspec.structs.replace(here, executor="hf", exact=False, facts={"threads": "4", "gpu": "x"})
    found = {each.fact: (each.recorded, each.found) for each in differences(RECORDED, other)}
    assert found == {
        "threads": ("2", "4"),
        "dtype": ("float32", None),
        "gpu": (None, "x"),
        "executor": ("fake", "hf"),
        "exact": ("true", "false"),
    }


def test_the_executor_is_the_recorded_one_unless_another_is_asked_for():
    kind, options = ExecutorChoice().of(RECORDED, foreign=False)
    assert (kind, options.model, options.threads, options.extra) == (
        "fake",
        "package:fake",
        2,
        {"vocab_size": "128"},
    )
    kind, options = ExecutorChoice(executor="hf", model="m", threads=1, options={}).of(RECORDED, foreign=False)
    assert (kind, options.model, options.threads, options.extra) == ("hf", "m", 1, {})
    old = msgspec.structs.replace(RECORDED, source=None, facts={}, options={})
    _, options = ExecutorChoice().of(old, foreign=False)
    assert (options.model, options.threads) == (RECORDED.model.tokenizer or None, None)


def test_bounds_grow_with_the_steps_and_with_the_dtype():
    single, half, double = map(tolerance_of, ("float32", "bfloat16", "float64"))
    assert double.loss(0) < single.loss(0) < half.loss(0)
    assert single.loss(9) == pytest.approx(10 * single.loss(0))
    assert single.norm(3) == pytest.approx(10 * single.loss(3))
    assert tolerance_of("float32", 0.5).loss(1) == 1.0


def test_numbers_apart():
    assert relative(0.0, 0.0) == 0.0 and relative(1.0, 1.1) == pytest.approx(0.1 / 1.1) == relative(-1.1, -1.0)
    assert not relative(math.nan, 1.0) <= 1e9
    before = [floats(-1.0, -2.0), floats(-3.0)]
    assert mean_difference(before, before) == 0.0
    assert mean_difference(before, [floats(-1.0, -2.5), floats(-4.0)]) == pytest.approx(0.5)
    assert mean_difference(before, [floats(-1.0), floats(-3.0)]) == math.inf
    assert mean_difference([], []) == 0.0
    assert math.isnan(per_token(1.0, 0)) and per_token(3.0, 2) == 1.5


def test_a_finding_is_one_line_with_both_values():
    text = Finding(
        what="gradient", position=9, seq=4, kind="optim_step", step=3, recorded="ab" * 32, found="cd" * 32
    ).text
    assert (
        text == "gradient of optim_step at seq 4 (event 9), step 3: recorded abababababababab…, found cdcdcdcdcdcdcdcd…"
    )
    assert "0.1" in Finding(what="loss", position=9, recorded=0.1, found=0.2).text


def test_settings_of_a_fork():
    change = parse_settings({"learning_rate": "1e-3", "grad_clip_norm": "2"})
    assert change(AdamParams(beta1=0.5)) == AdamParams(beta1=0.5, learning_rate=1e-3, grad_clip_norm=2.0)


def test_a_plot_is_refused_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(InvalidRequest, match=r"\.png or a \.html"):
        plot.require(tmp_path / "losses.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match="matplotlib"):
        plot.require(tmp_path / "losses.png")
