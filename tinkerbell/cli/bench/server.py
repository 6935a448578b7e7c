"""`tinkerbell bench server`: what the whole server adds to its executor, on the same training work."""

import tempfile
from pathlib import Path

import click
import msgspec

from tinkerbell.cli.bench import machine
from tinkerbell.cli.bench.options import DEFAULT_MODEL, machine_options, progress, torch_facts
from tinkerbell.cli.bench.report import Expectation, Report, Rows, below, holds, json_file_option, publish

COLUMNS = ("variant", "cpu_s", "wall_s", "tokens_per_s", "cpu_overhead", "wall_overhead", "peak_rss_mb")
OVERHEAD = 0.05
EXECUTOR, SERVER = "executor alone", "whole server"


class Spent(msgspec.Struct, kw_only=True):
    """The least that a round of steps took."""

    cpu_s: float = float("inf")
    wall_s: float = float("inf")

    def add(self, cpu_s: float, wall_s: float) -> None:
        """One more round."""
        self.cpu_s, self.wall_s = min(self.cpu_s, cpu_s), min(self.wall_s, wall_s)


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What was found."""

    model: str
    num_tokens: int
    """Of one round."""
    spent: dict[str, Spent]
    rss_mb: float
    """Sum of the largest resident sizes of the server's processes while it trained."""
    same_bits: bool
    """Whether all adapters ended with the same state both ways."""


@click.command()
@click.option("--clients", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Of each client, in a round.")
@click.option("--repeats", type=click.IntRange(min=1), default=2, show_default=True, help="The least round counts.")
@click.option("--length", type=click.Choice(["tiny", "normal", "long"]), default="normal", show_default=True)
@machine_options
@json_file_option
def server(
    clients: int, steps: int, repeats: int, length: str, model: str, threads: int, json_file: Path | None
) -> None:
    """CPU and wall seconds of training through the server, against its executor alone in this process.

    Clients, each with an adapter, send fwdbwd and optim_step together and their next step when both are answered.
    The executor alone gets the same steps of all clients in one batch after the other, which is the least it can
    take. CPU seconds are those of the server and its executor process, as the system counts them (Linux only), not
    of the clients. At the end every adapter must have the same state both ways, bit for bit.

    \b
    tinkerbell bench server
    tinkerbell bench server --clients 16 --length tiny
    """
    from tinkerbell.cli.bench.processes import require_proc
    from tinkerbell.executors import registry

    require_proc()
    registry.load("hf")  # where torch is missing, this says how to install it
    from tinkerbell.cli.bench.serving import measure

    with tempfile.TemporaryDirectory(prefix="tinkerbell-bench-") as scratch:
        facts = machine.describe(Path(scratch))
        with progress("server") as tell:
            measured = measure(Path(scratch) / "data", model, threads, clients, steps, repeats, length, tell)
    rows = rows_of(measured)
    report = Report(
        benchmark="server",
        parameters={
            "model": measured.model,
            "threads": threads,
            "clients": clients,
            "steps": steps,
            "length": length,
            "tokens": measured.num_tokens,
            "repeats": repeats,
            "database": "sqlite, durability full",
            **torch_facts(),
        },
        machine=facts,
        rows=rows,
        expectations=expectations(rows, measured.same_bits, default=model == DEFAULT_MODEL and length == "normal"),
    )
    publish(report, COLUMNS, json_file)


def rows_of(measured: Measured) -> Rows:
    """The executor's and the server's."""
    alone = measured.spent[EXECUTOR]
    return [
        {
            "variant": name,
            "cpu_s": spent.cpu_s,
            "wall_s": spent.wall_s,
            "tokens_per_s": measured.num_tokens / spent.wall_s,
            "cpu_overhead": None if name == EXECUTOR else spent.cpu_s / alone.cpu_s - 1,
            "wall_overhead": None if name == EXECUTOR else spent.wall_s / alone.wall_s - 1,
            "peak_rss_mb": None if name == EXECUTOR else measured.rss_mb,
        }
        for name, spent in measured.spent.items()
    ]


def expectations(rows: Rows, same_bits: bool, *, default: bool) -> list[Expectation]:
    """The overhead is bounded on the default work only: tiny models leave nothing to compare with."""
    found = [holds("the same bits through the server and without it", same_bits)]
    for row in rows:
        if default and row["variant"] == SERVER:
            found += [
                below(f"{what} overhead of the server", row[f"{what}_overhead"], OVERHEAD) for what in ("cpu", "wall")
            ]
    return found
