"""`tinkerbell bench train`: many adapters in one pass against taking turns, and against the machine's limit."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinkerbell.cli.bench import machine
from tinkerbell.cli.bench.options import DEFAULT_MODEL, machine_options, progress, torch_facts
from tinkerbell.cli.bench.report import (
    Expectation,
    Report,
    Rows,
    at_least,
    at_most,
    holds,
    json_file_option,
    publish,
)

if TYPE_CHECKING:
    from tinkerbell.cli.bench.adamw import Steps
    from tinkerbell.cli.bench.training import Bench, Cell

COLUMNS = (
    "length", "tenants", "tokens", "variant", "cpu_s", "wall_s", "tokens_per_cpu_s", "fused_gain", "of_gemm_limit",
    "peak_mb",
)  # fmt: skip
OVER_TURNS = {("normal", 4): 1.4, ("tiny", 16): 1.9}
"""(length, tenants) -> how many times less CPU the fused pass must take than PEFT taking turns."""
OVER_PADDED_512 = {("normal", 4): 8.0}
OF_LIMIT = {("normal", 4): 0.7, ("normal", 16): 0.7}
EXACT_OVER_FAST = {("normal", 4): 0.08, ("tiny", 16): 0.30}
"""(length, tenants) -> the largest part of fast mode's CPU time that exact mode may add."""
PEAK_GB = {("normal", 16): 1.3}
OPTIMIZER_GAIN = 3.0
OPTIMIZER_ADAPTERS = 4
OPTIMIZER_REPEATS = 15


@click.command()
@click.option(
    "--tenants", "num_tenants", type=click.IntRange(1, 64), multiple=True, default=(1, 4, 16), show_default=True
)
@click.option(
    "--length", "lengths", type=click.Choice(["tiny", "normal", "long"]), multiple=True, default=("tiny", "normal"),
    show_default=True, help="A tenant sends one sequence of 33 tokens, 200 in sequences of 32 to 128, or one of 512.",
)  # fmt: skip
@click.option("--repeats", type=click.IntRange(min=1), default=2, show_default=True, help="The least time counts.")
@click.option("--padded-512", is_flag=True, help="Also PEFT with every sequence padded to 512 tokens; slow.")
@click.option("--fast/--no-fast", default=True, show_default=True, help="Also fast mode, where the executor has one.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw tokens per second there; .png, .svg or .pdf."
)
@machine_options
@json_file_option
def train(
    num_tenants: tuple[int, ...],
    lengths: tuple[str, ...],
    repeats: int,
    padded_512: bool,
    fast: bool,
    plot: Path | None,
    model: str,
    threads: int,
    json_file: Path | None,
) -> None:
    """CPU seconds of forward and backward for the adapters of many tenants, and of their AdamW steps.

    All in one process, the variants taking turns: our executor with all tenants in one pass (exact, and fast where
    it has that mode) and with one tenant at a time; PEFT taking turns with `set_adapter`, one sequence at a time
    without padding, and one padded batch for each tenant. All compute the same losses, which is checked. The GEMM
    limit is what 4 flop for each weight and token, and 6 for each LoRA weight, take at the rate this machine's GEMMs
    reach meanwhile on the model's own shapes.

    Tenants have LoRAs of rank 16, 8 and 32 on q_proj and v_proj or on all linear layers, in turn. Peak memory is what
    a pass adds to the loaded models and adapters. The expectations are for the default model on a CPU.

    \b
    tinkerbell bench train
    tinkerbell bench train --tenants 4 --length normal --padded-512
    tinkerbell bench train --tenants 1 --tenants 2 --tenants 4 --tenants 8 --length long --plot train.png
    """
    from tinkerbell.executors import registry

    registry.load("hf")  # where torch is missing, this says how to install it
    if plot is not None:
        from tinkerbell.cli.bench import plot as drawing

        drawing.require(plot)
    from tinkerbell.cli.bench.training import LIMIT, Bench

    with tempfile.TemporaryDirectory(prefix="tinkerbell-bench-") as scratch:
        facts = machine.describe(Path(scratch))
    cells = [(length, count) for length in dict.fromkeys(lengths) for count in sorted(set(num_tenants))]
    with progress("training") as tell:
        tell("loading the model", 0, 1)
        bench = Bench(model, threads, max(num_tenants), fast=fast, padded_512=padded_512)
        turns = len(cells) * repeats * bench.num_variants
        done = 0
        measured = []
        for length, count in cells:

            def turn(name: str, length: str = length, count: int = count) -> None:
                nonlocal done
                done += 1
                tell(f"{length}, {count} tenants, {name}", done, turns)

            measured.append(bench.cell(length, count, repeats, turn))
        tell("optimizer", turns, turns)
        steps = bench.optimizer_steps(OPTIMIZER_ADAPTERS, OPTIMIZER_REPEATS)
    rows = [row for cell in measured for row in rows_of(bench, cell)]
    optimizer_rows = optimizer_table(steps)
    report = Report(
        benchmark="train",
        parameters={
            "model": bench.exact.info.name,
            "threads": threads,
            "repeats": repeats,
            **torch_facts(),
            "gemm_gflops_per_cpu_s": round(bench.gemms.flops_per_cpu_s() / 1e9, 1),
            "linear_weights": bench.gemms.num_weights,
            "fast_mode": "measured" if bench.fast is not None else ("not offered" if fast else "not asked for"),
        },
        machine=facts,
        rows=rows,
        tables={
            f"AdamW, {steps.num_adapters} adapters, {steps.num_parameters:,} parameters in {steps.num_tensors} tensors":
            optimizer_rows
        },
        expectations=expectations(rows, steps) if model == DEFAULT_MODEL else [holds(*bits(steps))],
    )  # fmt: skip
    if plot is not None:
        drawing.draw(rows, LIMIT, plot, f"{bench.exact.info.name}, fp32, {threads} thread{'s' * (threads > 1)}")
        click.echo(f"{plot} is written.", err=True)
    publish(report, COLUMNS, json_file)


def rows_of(bench: "Bench", cell: "Cell") -> Rows:
    """One row for each variant, and one for the limit."""
    from tinkerbell.cli.bench.training import FUSED, LIMIT

    where = {"length": cell.length, "tenants": cell.num_tenants, "tokens": cell.num_tokens}
    limit = bench.limit(cell)
    fused = cell.costs[FUSED].cpu_s
    rows = [
        {
            **where,
            "variant": name,
            "cpu_s": cost.cpu_s,
            "wall_s": cost.wall_s,
            "tokens_per_cpu_s": cell.num_tokens / cost.cpu_s,
            "tokens_per_s": cell.num_tokens / cost.wall_s,
            "fused_gain": cost.cpu_s / fused,
            "of_gemm_limit": limit / cost.cpu_s,
            "peak_mb": None if cost.peak_bytes is None else cost.peak_bytes / 1e6,
        }
        for name, cost in cell.costs.items()
    ]
    return [
        *rows,
        {
            **where,
            "variant": LIMIT,
            "cpu_s": limit,
            "tokens_per_cpu_s": cell.num_tokens / limit,
            "fused_gain": limit / fused,
            "of_gemm_limit": 1.0,
        },
    ]


def optimizer_table(steps: "Steps") -> Rows:
    """One row for each way to take the steps."""
    from tinkerbell.cli.bench.adamw import DIGESTS, TOGETHER

    ours = steps.costs[TOGETHER].cpu_s
    return [
        {
            "variant": name,
            "cpu_ms": cost.cpu_s * 1e3,
            "wall_ms": cost.wall_s * 1e3,
            "gain": None if name == DIGESTS else cost.cpu_s / ours,
        }
        for name, cost in steps.costs.items()
    ]


def bits(steps: "Steps") -> tuple[str, bool]:
    """The promise every model is held to."""
    return "AdamW in one call leaves the bits of one adapter at a time", steps.same_bits


def expectations(rows: Rows, steps: "Steps") -> list[Expectation]:
    """For the cells that were measured."""
    from tinkerbell.cli.bench import adamw
    from tinkerbell.cli.bench.training import FAST, FUSED, PADDED_512, TURNS

    found: list[Expectation] = []
    by_variant: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_variant.setdefault((row["length"], row["tenants"]), {})[row["variant"]] = row
    for cell, variants in by_variant.items():
        where = f"{cell[0]}, {cell[1]} tenants"
        for name, bounds in ((TURNS, OVER_TURNS), (PADDED_512, OVER_PADDED_512)):
            if cell in bounds and name in variants:
                found.append(at_least(f"{where}: fused over {name}", variants[name]["fused_gain"], bounds[cell]))
        if cell in OF_LIMIT:
            found.append(at_least(f"{where}: of the GEMM limit", variants[FUSED]["of_gemm_limit"], OF_LIMIT[cell]))
        if cell in EXACT_OVER_FAST and FAST in variants:
            cost = 1 / variants[FAST]["fused_gain"] - 1
            found.append(at_most(f"{where}: what exact mode adds to fast", cost, EXACT_OVER_FAST[cell]))
        peak = variants[FUSED]["peak_mb"]
        if cell in PEAK_GB and peak is not None:
            found.append(at_most(f"{where}: peak GB over the model", peak / 1e3, PEAK_GB[cell]))
    gain = steps.costs[adamw.LOOP].cpu_s / steps.costs[adamw.TOGETHER].cpu_s
    found.append(at_least(f"AdamW of {steps.num_adapters} adapters over torch's for-loop", gain, OPTIMIZER_GAIN))
    return [*found, holds(*bits(steps))]
