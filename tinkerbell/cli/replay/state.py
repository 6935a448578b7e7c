"""`tinkerbell replay state`: the weights a run had at any place."""

from pathlib import Path

import click
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


@click.command(epilog=STATUSES)
@click.argument("run")
@click.option("--at", required=True, metavar="PLACE", help="The last request whose effect it has.")
@click.option(
    "-o", "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Directory to write to."
)
@click.option("--with-optimizer", is_flag=True, help="Write Adam's moments, too.")
@executor_options
@log_options
@json_option
def state(
    run: str,
    at: str,
    out: Path,
    with_optimizer: bool,
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
    """Write the weights RUN had at a PLACE as a directory that PEFT loads.

    Begins with the newest saved state before it and executes what came since, comparing digests on the way.

    \b
    tinkerbell replay state ad_5h3k --at step:10 --out adapter
    """
    from tinkerbell import replay

    with unknown_is_2(), log_of(run, config, data_dir, database_url) as (log, name):
        choice = choice_of(executor, model, threads, pairs, trust_archive)
        with progress(f"state {name}") as tell:
            found = replay.state_at(log, name, at, choice=choice, tell=tell)
        files = [] if found.findings else replay.write_adapter(found.state, out, with_optimizer=with_optimizer)
    if as_json:
        facts = {"run": found.run, "seq": found.seq, "step": found.step, "state_digest": found.state.digest}
        print_json(
            {
                **facts, "files": [str(file) for file in files], "num_executed": found.num_executed,
                "differences": found.differences, "findings": found.findings,
            }
        )  # fmt: skip
        return DIVERGED if found.findings else EQUAL
    console = wide_console()
    tell_differences(console, found.differences)
    tell_findings(console, found.findings)
    if found.findings:
        console.print(Text("The way there is not as recorded: nothing was written.", style="bold red"))
        return DIVERGED
    console.print(Text(f"{found.run} at seq {found.seq}, step {found.step}: {', '.join(map(str, files))}"))
    return EQUAL
