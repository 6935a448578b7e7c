"""`tinkerbell bench recovery`: what digests and checkpoints add to the steps they make recoverable."""

import math
import tempfile
from pathlib import Path

import click

from tinkerbell.cli.bench import machine
from tinkerbell.cli.bench.options import DEFAULT_MODEL, machine_options, progress, torch_facts
from tinkerbell.cli.bench.report import Expectation, Report, Rows, at_most, json_file_option, publish
from tinkerbell.config import Settings

COLUMNS = ("part", "cpu_ms_per_step", "wall_ms_per_step", "share_of_step")
STEP, DIGESTS, CHECKPOINTS = "steps without either", "digests", "checkpoints"
ADDED = 0.03
"""Most that digests and checkpoints together may add to the CPU time of steps."""
HELD_UP = 0.05
"""Most that a checkpoint may hold up the executor, as a share of a cycle of all tenants."""
HELD_TITLE = "A checkpoint of {mb:.0f} MB, while which others wait"


@click.command()
@click.option("--tenants", "num_tenants", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--length", type=click.Choice(["tiny", "normal", "long"]), default="normal", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="The least time counts.")
@click.option(
    "--every-steps",
    type=click.IntRange(min=1),
    default=Settings().checkpoint_every_steps,
    show_default=True,
    help="Steps between two checkpoints of an adapter, at most.",
)
@click.option(
    "--every-s", type=click.FloatRange(min=0, min_open=True), default=Settings().checkpoint_every_s, show_default=True,
    help="Seconds between two checkpoints of an adapter, at most.",
)  # fmt: skip
@machine_options
@json_file_option
def recovery(
    num_tenants: int,
    length: str,
    repeats: int,
    every_steps: int,
    every_s: float,
    model: str,
    threads: int,
    json_file: Path | None,
) -> None:
    """CPU time of digests and checkpoints, as shares of the training steps they belong to.

    A step is a fwdbwd and an optim_step of each tenant, all in one batch. Digests are the hashes of gradients,
    weights and optimizer states after it, and of the logprobs. A checkpoint is a snapshot in the executor, for
    which others wait, and blobs written and synced beside them; its cost is spread over the steps in between.

    \b
    tinkerbell bench recovery
    tinkerbell bench recovery --tenants 1 --length tiny
    """
    from tinkerbell.executors import registry

    registry.load("hf")  # where torch is missing, this says how to install it
    from tinkerbell.cli.bench.recovering import measure

    with tempfile.TemporaryDirectory(prefix="tinkerbell-bench-") as scratch:
        facts = machine.describe(Path(scratch))
        with progress("recovery") as tell:
            measured = measure(Path(scratch), model, threads, num_tenants, length, repeats, tell)
    costs = measured.costs
    rows: Rows = []
    between = min(every_steps, max(1, math.ceil(every_s / costs[STEP].wall_s)))
    for part, share in ((STEP, 1.0), (DIGESTS, 1.0), (CHECKPOINTS, 1 / between)):
        cpu_s, wall_s = (share * part_s for part_s in (costs[part].cpu_s, costs[part].wall_s))
        rows.append(
            {
                "part": part,
                "cpu_ms_per_step": 1e3 * cpu_s,
                "wall_ms_per_step": 1e3 * wall_s,
                "share_of_step": cpu_s / costs[STEP].cpu_s,
            }
        )
    held = measured.snapshot.wall_s
    report = Report(
        benchmark="recovery",
        parameters={
            "model": measured.model,
            "threads": threads,
            "tenants": num_tenants,
            "length": length,
            "tokens": measured.num_tokens,
            "steps_between_checkpoints": between,
            "repeats": repeats,
            **torch_facts(),
        },
        machine=facts,
        rows=rows,
        expectations=expectations(rows, held / costs[STEP].wall_s)
        if model == DEFAULT_MODEL and length == "normal"
        else [],
        tables={
            HELD_TITLE.format(mb=measured.snapshot_bytes / 1e6): [
                {"snapshot wall ms": 1e3 * held, "share of a cycle": held / costs[STEP].wall_s}
            ]
        },
    )
    publish(report, COLUMNS, json_file)


def expectations(rows: Rows, held: float) -> list[Expectation]:
    """On the default work only: tiny models leave nothing to compare with."""
    added = sum(row["share_of_step"] for row in rows if row["part"] != STEP)
    return [
        at_most("what digests and checkpoints add to a step's CPU time", added, ADDED),
        at_most("a checkpoint's hold on the executor, of a cycle's time", held, HELD_UP),
    ]
