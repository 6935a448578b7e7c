"""`tinkerbell replay fork`: what if the optimizer had been set otherwise from here on?"""

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.text import Text

from tinkerbell.cli.options import json_option, log_options, print_json, print_table, wide_console
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
    from tinkerbell.replay import Fork


@click.command(epilog=STATUSES)
@click.argument("run")
@click.option("--at", required=True, metavar="PLACE", help="The last request of the shared past.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    required=True,
    metavar="NAME=VALUE",
    help="Of AdamW, as learning_rate=1e-4; can be given several times.",
)
@click.option("--until", metavar="PLACE", help="The last request of the fork.  [default: the run's last]")
@click.option(
    "-o", "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Directory to write to."
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Both curves; .png or .html.")
@executor_options
@log_options
@json_option
def fork(
    run: str,
    at: str,
    settings: tuple[str, ...],
    until: str | None,
    out: Path,
    plot: Path | None,
    executor: str | None,
    model: str | None,
    threads: int | None,
    pairs: tuple[str, ...],
    config: Path | None,
    data_dir: str | None,
    database_url: str | None,
    as_json: bool,
) -> int:
    """Share the past of RUN up to a PLACE, then execute its later requests with other settings of the optimizer.

    The past comes from its newest saved state and is executed at most once, checked against its digests. The log is not
    changed: the fork is a directory with its last weights as a PEFT adapter, Adam's moments, and fork.json with both
    curves. Sampled data stays the log's.

    \b
    tinkerbell replay fork ad_5h3k --at step:10 --set learning_rate=1e-4 --out fork --plot fork.png
    """  # fmt: skip
    from tinkerbell import replay
    from tinkerbell.config import name_and_value
    from tinkerbell.replay import plot as plotting

    with unknown_is_2(), log_of(run, config, data_dir, database_url) as (log, name):
        if plot is not None:
            plotting.require(plot)
        with progress(f"fork {name}") as tell:
            made = replay.fork(
                log, name, at, dict(map(name_and_value, settings)), until=until,
                choice=choice_of(executor, model, threads, pairs), tell=tell,
            )  # fmt: skip
        if made.state is not None:
            replay.write_adapter(made.state, out, with_optimizer=True)
            (out / "fork.json").write_bytes(msgspec.json.format(msgspec.json.encode(facts(made)), indent=1) + b"\n")
        if plot is not None:
            was = [*made.past, *made.points]
            changed = ", ".join(f"{name} {value:g}" for name, value in made.changed.items())
            last = [(point.step, point.recorded) for point in made.past[-1:]]
            curves = [
                plotting.curve("as recorded", [(point.step, point.recorded) for point in was]),
                plotting.curve(changed, last + [(point.step, point.replayed) for point in made.points]),
            ]
            plotting.draw(plot, f"{made.run} from step {made.at_step} on", curves)
    if as_json:
        print_json(facts(made))
    else:
        show(wide_console(), made, out)
    return DIVERGED if made.findings else EQUAL


def facts(made: "Fork") -> dict[str, object]:
    """The fork without its weights."""
    found: dict[str, object] = {field: getattr(made, field) for field in made.__struct_fields__ if field != "state"}
    return {**found, "state_digest": None if made.state is None else made.state.digest}


def show(console: Console, made: "Fork", out: Path) -> None:
    """The fork for a person."""
    tell_differences(console, made.differences)
    tell_findings(console, made.findings)
    if made.state is None:
        console.print(Text("The past is not as recorded: nothing was forked.", style="bold red"))
        return
    rows = [(point.step, point.recorded, point.replayed) for point in made.points]
    print_table(f"{made.run} from step {made.at_step} on", ("step", "loss as recorded", "loss of the fork"), rows)
    console.print(Text(f"{made.num_executed_before} requests of the past were executed; the fork is in {out}"))
