"""The benchmarks of the HF executor: what they compare is the same work, and their arithmetic is right."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from tests.support.rounding import CLOSE
from tests.support.tiny_model import write_tiny_model
from tests.support.waiting import PATIENCE_S
from tinkerbell.cli.bench import gemm, plot, processes
from tinkerbell.cli.bench.adamw import LOOP, TOGETHER, Steps
from tinkerbell.cli.bench.cost import Cost, compare
from tinkerbell.cli.bench.gemm import Gemms
from tinkerbell.cli.bench.group import bench
from tinkerbell.cli.bench.ours import Ours
from tinkerbell.cli.bench.train import expectations
from tinkerbell.cli.bench.training import ALONE, FAST, FUSED, LIMIT, TURNS, same_work
from tinkerbell.cli.bench.with_peft import WithPeft
from tinkerbell.cli.bench.workload import LENGTHS, tenants
from tinkerbell.errors import ServerError
from tinkerbell.executors.hf.adapter import LinearShape
from tinkerbell.executors.port import OptimStepDone
from tinkerbell.types import AdamParams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=1024)


def ran(*args: str) -> Result:
    result = CliRunner().invoke(bench, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


# ---- the load -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_loads_are_prefixes_of_larger_ones(length: str) -> None:
    few, many = tenants(length, 3, 257), tenants(length, 7, 257)
    assert many[:3] == few
    assert len({tenant.adapter for tenant in many}) == 7
    assert many[0].data != many[1].data
    expected = {"tiny": 33, "normal": 200, "long": 512}[length]
    assert {tenant.num_tokens for tenant in many} == {expected}
    for datum in (datum for tenant in many for datum in tenant.data):
        assert datum.tokens[4:] == datum.targets[:-4]
        assert length != "normal" or datum.num_tokens >= 32


# ---- measuring ----------------------------------------------------------------------------------------------------


def test_variants_take_turns_and_the_least_counts() -> None:
    seen: list[str] = []
    sleeps = iter([0.0, 0.5, 0.0, 0.02])

    def slow() -> None:
        seen.append("slow")
        time.sleep(next(sleeps))

    costs = compare({"slow": slow, "quick": lambda: seen.append("quick")}, 2)
    assert seen == ["slow", "quick"] * 2
    assert costs["slow"].wall_s < 0.5 and costs["slow"].peak_bytes is None
    costs = compare({"slow": slow}, 2, fresh=lambda: seen.append("fresh"))
    assert seen[4:] == ["fresh", "slow", "slow"]
    assert costs["slow"].peak_bytes is not None


def test_a_turn_may_be_several_calls_in_a_row() -> None:
    seen: list[str] = []
    compare({name: partial(seen.append, name) for name in "ab"}, 2, calls=3)
    assert "".join(seen) == "aaabbb" * 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are reset through Linux's /proc")
def test_peak_memory_is_what_the_call_adds_at_most() -> None:
    """In a process of its own: how an allocator was set up before decides what it keeps of freed memory."""
    ended = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert ended.returncode == 0, ended.stderr


PEAK = """
import torch
from tinkerbell.cli.bench.memory import peak_bytes

MIB = 1024**2
held = torch.ones(64 * MIB // 4)

def call():
    torch.ones(96 * MIB // 4)
    torch.ones(32 * MIB // 4)

for _ in range(2):  # what the first call freed must not hide the second's
    peak = peak_bytes(call)
    assert peak is not None and 94 * MIB < peak < 110 * MIB, peak
assert held.sum() > 0
"""


def test_the_limit_counts_every_weight_of_every_layer() -> None:
    gemms = Gemms([LinearShape(8, 16), LinearShape(8, 16), LinearShape(16, 4)])
    assert gemms.num_weights == 2 * 8 * 16 + 16 * 4
    gemms.measure()
    rate = gemms.flops_per_cpu_s()
    assert rate > 0
    assert gemms.least_cpu_s(100, 0) == pytest.approx(4 * 320 * 100 / rate)
    assert gemms.least_cpu_s(100, 7) == pytest.approx((4 * 320 * 100 + 6 * 7) / rate)
    for _ in range(3):
        gemms.measure()
    assert gemms.flops_per_cpu_s() >= rate
    assert gemm.ROWS >= 128


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
def test_cpu_seconds_of_a_process_and_its_children() -> None:
    burn = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    script = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {burn + 'input()'!r}]).wait()"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while processes.cpu_seconds(child.pid) < 0.3:
            assert time.monotonic() < deadline, "the grandchild's time is not counted"
            time.sleep(0.05)
        assert len(processes.family(child.pid)) == 2
        assert processes.peak_rss_bytes(child.pid) > 5 * 1024**2
    finally:
        child.communicate(b"\n", timeout=PATIENCE_S)
    assert os.getpid() not in processes.family(os.getpid())[1:]


# ---- the same work ------------------------------------------------------------------------------------------------


def test_peft_computes_what_ours_computes(model: Path) -> None:
    ours = Ours(str(model), 1)
    load = tenants("normal", 3, ours.info.vocab_size)
    for seed, tenant in enumerate(load):
        ours.create(tenant.adapter, tenant.lora, seed)
    peft = WithPeft(str(model), ours.states)
    losses = ours.together(load)
    assert ours.one_at_a_time(load) == losses
    ours.reset()
    ours.together(load)
    norms = our_norms(ours, load)
    assert len(norms) == 3 and min(norms) > 0
    for variant in (peft.taking_turns, peft.padded, lambda load: peft.taking_turns(load, pad_to=256)):
        peft.reset()
        assert variant(load) == pytest.approx(losses, rel=CLOSE)
        assert [gradient_norm(peft, tenant.adapter) for tenant in load] == pytest.approx(norms, rel=CLOSE)
    ours.reset()
    assert ours.together(load) == losses, "reset does not lead back to the beginning"
    first = load[0]
    ours.executor.create(first.adapter, first.lora, 0)
    assert ours.together(load)[0] != pytest.approx(losses[0], rel=2 * CLOSE), "an untrained adapter has the same loss"


def our_norms(ours: Ours, load: Any) -> list[float]:
    from tinkerbell.executors.port import Batch, OptimStep

    units = [OptimStep(request=n, adapter=tenant.adapter, adam=AdamParams()) for n, tenant in enumerate(load)]
    answers = ours.executor.run(Batch(id="1.1", units=list(units))).results
    return [answer.grad_norm for answer in answers if isinstance(answer, OptimStepDone)]


def gradient_norm(peft: WithPeft, adapter: str) -> float:
    named = peft.model.named_parameters()
    squares = [
        float(p.grad.double().square().sum()) for name, p in named if f".{adapter}." in name and p.grad is not None
    ]
    return float(sum(squares) ** 0.5)


def test_samples_are_the_same(model: Path) -> None:
    ours = Ours(str(model), 1)
    load = tenants("tiny", 2, ours.info.vocab_size)
    for seed, tenant in enumerate(load):
        ours.create(tenant.adapter, tenant.lora, seed)
    peft = WithPeft(str(model), ours.states)
    prompts = [(load[n % 2].adapter, load[n % 2].data[0].tokens[: 4 * (3 + 5 * n)]) for n in range(4)]
    expected = ours.sample(prompts, 6)
    assert [len(tokens) for tokens in expected] == [24] * 4
    for variant in (peft.generate_one_by_one, peft.generate_by_adapter, peft.generate_mixed):
        assert variant(prompts, 6) == expected, variant.__name__


def test_other_work_is_refused() -> None:
    same_work({FUSED: [10.0, 20.0], TURNS: [10.0004, 20.0]})
    with pytest.raises(ServerError, match=r"peft, taking turns.*20\.1"):
        same_work({FUSED: [10.0, 20.0], TURNS: [10.0, 20.1]})
    with pytest.raises(ServerError, match="nan"):
        same_work({FUSED: [10.0], TURNS: [float("nan")]})


def test_deterministic_kernels_are_ours_alone(model: Path) -> None:
    ours = Ours(str(model), 1)
    (tenant,) = tenants("tiny", 1, ours.info.vocab_size)
    ours.create(tenant.adapter, tenant.lora, 0)
    peft = WithPeft(str(model), ours.states)
    seen = []
    peft.model.register_forward_pre_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    peft.taking_turns([tenant])
    assert seen == [False]
    assert torch.are_deterministic_algorithms_enabled()


# ---- reports ------------------------------------------------------------------------------------------------------


def rows_of_a_cell(length: str, num_tenants: int, **gains: float) -> list[dict[str, Any]]:
    names = {"fused": FUSED, "fast": FAST, "turns": TURNS}
    where = {"length": length, "tenants": num_tenants}
    return [
        {**where, "variant": names[name], "fused_gain": gain, "of_gemm_limit": 0.71 / gain, "peak_mb": 1200.0}
        for name, gain in gains.items()
    ]


def some_steps(loop_s: float, same_bits: bool = True) -> Steps:
    costs = {TOGETHER: Cost(cpu_s=0.01, wall_s=0.01), LOOP: Cost(cpu_s=loop_s, wall_s=loop_s)}
    return Steps(num_adapters=4, num_parameters=1, num_tensors=1, costs=costs, same_bits=same_bits)


def test_expectations_of_training() -> None:
    good = rows_of_a_cell("normal", 4, fused=1.0, turns=1.41, fast=0.95) + rows_of_a_cell(
        "tiny", 16, fused=1.0, turns=1.95, fast=0.8
    )
    found = expectations(good, some_steps(0.031))
    assert len(found) == 7 and all(expectation.met for expectation in found)
    bad = rows_of_a_cell("normal", 4, fused=1.2, turns=1.39, fast=0.9) + rows_of_a_cell("tiny", 16, fused=1, fast=0.7)
    missed = {e.what for e in expectations(bad, some_steps(0.029, same_bits=False)) if not e.met}
    assert len(missed) == 6 and any("limit" in what for what in missed)
    assert len(expectations(rows_of_a_cell("long", 2, fused=1.0), some_steps(1))) == 2


def test_train(model: Path, tmp_path: Path) -> None:
    file, picture = tmp_path / "train.json", tmp_path / "train.svg"
    output = ran(
        "train", "--model", str(model), "--tenants", "1", "--tenants", "3", "--length", "tiny", "--repeats", "1",
        "--padded-512", "--json", str(file), "--plot", str(picture),
    ).output  # fmt: skip
    report = json.loads(file.read_text())
    variants = [row["variant"] for row in report["rows"] if row["tenants"] == 3]
    assert variants[0] == FUSED and {"ours, one at a time", TURNS, "peft, padded to 512", "gemm limit"} <= set(variants)
    assert all(row["tokens"] == 33 * row["tenants"] and row["cpu_s"] > 0 for row in report["rows"])
    assert "AdamW, 4 adapters" in output and "peft, taking turns" in output
    (table,) = report["tables"].values()
    assert [row["variant"] for row in table][:2] == [TOGETHER, "one adapter at a time"]
    assert [e["what"] for e in report["expectations"]] == ["AdamW in one call leaves the bits of one adapter at a time"]
    assert "peft, taking turns" in picture.read_text()


def test_only_the_limit_is_dashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest load lacks a variant, so the order of appearance says nothing."""
    from matplotlib.axes import Axes

    lines: dict[str, Any] = {}
    draw_line = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *a, **k: (lines.update({k["label"]: k}), draw_line(self, *a, **k))[1]
    )
    names = {1: [FUSED, TURNS, LIMIT], 4: [FUSED, ALONE, TURNS, LIMIT]}
    rows = [
        {"length": "tiny", "tenants": tenants, "variant": name, "tokens_per_cpu_s": 1.0}
        for tenants, of in names.items()
        for name in of
    ]
    plot.draw(rows, LIMIT, tmp_path / "x.png", "title")
    assert {name for name, line in lines.items() if line["linestyle"] == "--"} == {LIMIT}
    assert len({line["color"] for line in lines.values()}) == 4
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_sample(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "sample.json"
    ran(
        "sample", "--model", str(model), "--requests", "5", "--tokens", "6", "--adapters", "2", "--prompt-tokens", "8",
        "--json", str(file),
    )  # fmt: skip
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 4 and {row["same_tokens"] for row in rows} == {1.0}


def test_recovery(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "recovery.json"
    args = ["--model", str(model), "--tenants", "2", "--length", "tiny", "--repeats", "1", "--every-steps", "10"]
    ran("recovery", *args, "--json", str(out))
    report = json.loads(out.read_text())
    rows = {row["part"]: row for row in report["rows"]}
    assert list(rows) == ["steps without either", "digests", "checkpoints"]
    assert all(row["cpu_ms_per_step"] > 0 for row in rows.values())
    assert rows["digests"]["share_of_step"] == pytest.approx(
        rows["digests"]["cpu_ms_per_step"] / rows["steps without either"]["cpu_ms_per_step"]
    )
    (held,) = next(iter(report["tables"].values()))
    assert held["snapshot wall ms"] > 0


def test_server(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "server.json"
    ran(
        "server", "--model", str(model), "--clients", "2", "--steps", "2", "--repeats", "1", "--length", "tiny",
        "--json", str(file),
    )  # fmt: skip
    report = json.loads(file.read_text())
    assert [row["variant"] for row in report["rows"]] == ["executor alone", "whole server"]
    assert report["rows"][1]["peak_rss_mb"] > 50
    assert [(e["what"], e["met"]) for e in report["expectations"]] == [
        ("the same bits through the server and without it", True)
    ]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["train", "--plot", "x.gif"], "x.gif does not end in .png, .svg, .pdf"),
        (["train", "--tenants", "0"], "0 is not in the range"),
        (["sample", "--requests", "0"], "0 is not in the range"),
    ],
)
def test_wrong_options_are_refused_at_once(args: list[str], text: str) -> None:
    result = CliRunner().invoke(bench, args)
    assert result.exit_code == 2 and text in result.output
