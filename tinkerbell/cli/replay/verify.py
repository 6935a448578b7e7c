"""`tinkerbell replay verify`: is a run what its log says?"""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

from tinkerbell.cli.options import json_option, log_options, print_json, wide_console
from tinkerbell.cli.replay.options import (
    DIVERGED,
    EQUAL,
    STATUSES,
    choice_of,
    executor_options,
    log_of,
    progress,
    tell_differences,
    tell_findings,
    unknown_is_2,
)

if TYPE_CHECKING:
    from tinkerbell.replay import Report


@click.command(epilog=STATUSES)
@click.argument("run")
@click.option(
    "--from", "since", metavar="PLACE", help="Begin at the newest saved state at or before it.  [default: add_lora]"
)
@click.option("--samples", is_flag=True, help="Draw the samples again, too; tokens and logprobs must be the same.")
@click.option("--keep-going", is_flag=True, help="Go on after the first divergence.")
@click.option("--head", help="Hash of an event that the run must have, as `replay export` printed it.")
@click.option(
    "--rtol",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    help="Bound of losses, relative, per step.",
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Recorded and replayed losses; .png or .html."
)
@executor_options
@log_options
@json_option
def verify(
    run: str,
    since: str | None,
    samples: bool,
    keep_going: bool,
    head: str | None,
    rtol: float | None,
    plot: Path | None,
    executor: str | None,
    model: str | None,
    threads: int | None,
    pairs: tuple[str, ...],
    trust_archive: bool,
    config: Path | None,
    data_dir: str | None,
    database_url: str | None,
    as_json: bool,
) -> int:
    """Execute RUN again and compare every digest the log has of it.

    First the hashes of its events, bodies and blobs, and the plans of its batches. Then every request in an executor
    like the recorded one: losses, logprobs, gradients, weights, Adam's moments. Where the environment is the recorded
    one every bit must be the same. Elsewhere losses, logprobs and the norms of gradients must agree within bounds that
    grow with every step: relative 1e-4 in float32, 2e-2 in bfloat16, 1e-9 in float64, norms ten times that (--rtol).

    \b
    tinkerbell replay verify ad_5h3k --plot losses.png
    tinkerbell replay verify run.zip --threads 2
    """
    from tinkerbell import replay
    from tinkerbell.replay import plot as plotting

    with unknown_is_2(), log_of(run, config, data_dir, database_url) as (log, name):
        choice = choice_of(executor, model, threads, pairs, trust_archive)
        if plot is not None:
            plotting.require(plot)
        with progress(f"verify {name}") as tell:
            report = replay.verify(
                log, name, choice=choice, since=since, samples=samples,
                keep_going=keep_going, head=head, rtol=rtol, tell=tell,
            )  # fmt: skip
        if plot is not None:
            recorded = plotting.curve("recorded", [(point.step, point.recorded) for point in report.points])
            replayed = plotting.curve("replayed", [(point.step, point.replayed) for point in report.points])
            plotting.draw(plot, f"{report.name or report.run}: {report.verdict}", [recorded, replayed])
    if as_json:
        print_json(report)
    else:
        show(wide_console(), report)
    return DIVERGED if report.findings else EQUAL


def show(console: Console, report: "Report") -> None:
    """The report for a person."""
    tell_differences(console, report.differences)
    tell_findings(console, report.findings)
    name = f"{report.run} ({report.name})" if report.name else report.run
    if report.verdict == "diverged":
        console.print(Text(f"{name} is not as recorded.", style="bold red"))
        return
    steps = report.points[-1].step if report.points else report.begun_at_step
    counts = f"{report.num_executed} requests executed, {report.num_compared} comparisons, {report.took_s:.1f} s"
    if report.verdict == "equal":
        console.print(Text(f"{name}: every bit as recorded up to step {steps}", style="green") + Text(f" ({counts})"))
        return
    far = report.deviations
    console.print(Text(f"{name}: within bounds up to step {steps}", style="yellow") + Text(f" ({counts})"))
    console.print(
        Text(f"  at most apart: loss {far.loss:.2g}, logprobs {far.logprobs:.2g} nats, norm {far.grad_norm:.2g}")
    )
