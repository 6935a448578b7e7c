"""`tinkerbell replay fork`: what if the optimizer had been set otherwise from here on?"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from tinkerbell.files import write_private

if TYPE_CHECKING:
    from tinkerbell.cli.replay.online import ServerFork
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
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), help="Directory to write the fork to.")
@click.option(
    "--url", help="Server of this log, to fork there instead; the key of the run's tenant is in TINKERBELL_API_KEY."
)
@click.option("--name", help="Of the new adapter, with --url.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Both curves; .png or .html.")
@executor_options
@log_options
@json_option
def fork(
    run: str,
    at: str,
    settings: tuple[str, ...],
    until: str | None,
    out: Path | None,
    url: str | None,
    name: str | None,
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
    """Share the past of RUN up to a PLACE, then carry out its later requests with other settings of the optimizer.

    With --out in an executor of this command's own, and the log is not changed: the past comes from its newest saved
    state and is executed at most once, checked against its digests; the fork is a directory with its last weights as a
    PEFT adapter, Adam's moments, and fork.json with both curves.

    With --url on the running server: a new adapter that begins with the newest checkpoint the run has saved (or its
    seed), is sent what came since again and compared, and then the later requests, all of it in the log. It can be
    trained on, sampled and saved.

    Sampled data stays the log's.

    \b
    tinkerbell replay fork ad_5h3k --at step:10 --set learning_rate=1e-4 --out fork --plot fork.png
    tinkerbell replay fork ad_5h3k --at step:10 --set learning_rate=1e-4 --url http://127.0.0.1:8080
    """
    from tinkerbell import replay
    from tinkerbell.config import name_and_value
    from tinkerbell.replay import plot as plotting

    if (out is None) == (url is None):
        raise click.UsageError("say either --out DIRECTORY or --url SERVER")
    made: Fork | ServerFork
    with unknown_is_2(), log_of(run, config, data_dir, database_url) as (log, found):
        choice = choice_of(executor, model, threads, pairs, trust_archive)
        if plot is not None:
            plotting.require(plot)
        changes = dict(map(name_and_value, settings))
        with progress(f"fork {found}") as tell:
            if url is not None:
                from tinkerbell.cli.replay.online import fork_on_server
                from tinkerbell.sdk import Client

                with Client(url) as client:
                    made = fork_on_server(client, log, found, at, changes, until=until, name=name, tell=tell)
            else:
                made = replay.fork(log, found, at, changes, until=until, choice=choice, tell=tell)
        if out is not None and isinstance(made, replay.Fork) and made.state is not None:
            replay.write_adapter(made.state, out, with_optimizer=True)
            write_private(out / "fork.json", msgspec.json.format(msgspec.json.encode(facts(made)), indent=1) + b"\n")
        if plot is not None:
            draw(plot, made)
    if as_json:
        print_json(facts(made))
    else:
        show(wide_console(), made, f"in {out}" if out is not None else f"adapter {facts(made)['adapter']}")
    return DIVERGED if made.findings else EQUAL


def draw(file: Path, made: "Fork | ServerFork") -> None:
    """Both curves; they part where the fork is."""
    from tinkerbell.replay import plot as plotting

    was = [(point.step, point.recorded) for point in (*made.past, *made.points)]
    changed = ", ".join(f"{name} {value:g}" for name, value in made.changed.items())
    last = [(point.step, point.recorded) for point in made.past[-1:]]
    curves = [
        plotting.curve("as recorded", was),
        plotting.curve(changed, last + [(point.step, point.replayed) for point in made.points]),
    ]
    plotting.draw(file, f"{made.run} from step {made.at_step} on", curves)


def facts(made: "Fork | ServerFork") -> dict[str, Any]:
    """The fork without its weights."""
    found: dict[str, Any] = {field: getattr(made, field) for field in made.__struct_fields__ if field != "state"}
    state = getattr(made, "state", None)
    return found if state is None else {**found, "state_digest": state.digest}


def show(console: Console, made: "Fork | ServerFork", where: str) -> None:
    """The fork for a person."""
    tell_differences(console, getattr(made, "differences", ()))
    tell_findings(console, made.findings)
    if made.findings:
        console.print(Text("The past is not as recorded: nothing was forked.", style="bold red"))
        return
    rows = [(point.step, point.recorded, point.replayed) for point in made.points]
    print_table(f"{made.run} from step {made.at_step} on", ("step", "loss as recorded", "loss of the fork"), rows)
    console.print(Text(f"{made.num_executed_before} requests of the past were executed again; the fork is {where}"))
