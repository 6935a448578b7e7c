"""`tinkerbell replay diff`: where two runs part."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

from tinkerbell.cli.options import json_option, log_options, print_json, print_table, wide_console
from tinkerbell.cli.replay.options import log_of, unknown_is_2

if TYPE_CHECKING:
    from tinkerbell.replay import Diff


@click.command(epilog="Exit status: 0 nothing differs, 1 something does, 2 there is nothing to compare.")
@click.argument("a")
@click.argument("b")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Both curves; .png or .html.")
@log_options
@json_option
def diff(
    a: str,
    b: str,
    plot: Path | None,
    config: Path | None,
    data_dir: str | None,
    database_url: str | None,
    as_json: bool,
) -> int:
    """Compare two runs request by request: the first that differs, the settings, the losses. Executes nothing.

    \b
    tinkerbell replay diff ad_5h3k ad_8q2m --plot both.png
    """
    from tinkerbell import replay
    from tinkerbell.replay import plot as plotting

    with (
        unknown_is_2(),
        log_of(a, config, data_dir, database_url) as (log_a, run_a),
        log_of(b, config, data_dir, database_url) as (log_b, run_b),
    ):
        if plot is not None:
            plotting.require(plot)
        found = replay.diff(log_a, run_a, log_b, run_b)
        if plot is not None:
            of_a = plotting.curve(found.a, [(point.step, point.a) for point in found.points])
            of_b = plotting.curve(found.b, [(point.step, point.b) for point in found.points])
            plotting.draw(plot, "Losses", [of_a, of_b])
    if as_json:
        print_json(found)
    else:
        show(wide_console(), found)
    return int(found.first_request is not None or found.first_state is not None)


def show(console: Console, found: "Diff") -> None:
    """The difference for a person."""
    if found.first_request is None:
        console.print(Text("The same was asked of both."))
    else:
        at = found.first_request
        console.print(Text(f"first difference: {at.kind} at seq {at.seq}, {at.field}: {at.a} / {at.b}", style="bold"))
    if found.first_state is not None:
        console.print(Text(f"the states differ from step {found.first_state} on"))
    for each in found.environments:
        console.print(Text(f"environment, {each.fact}: {each.recorded} / {each.found}"))
    if found.settings:
        rows = [(each.name, ", ".join(each.a), ", ".join(each.b)) for each in found.settings]
        print_table("Settings", ("setting", found.a, found.b), rows, console=console)
    if found.points:
        rows_of_losses = [(point.step, point.a, point.b) for point in found.points]
        print_table("Losses per token", ("step", found.a, found.b), rows_of_losses, console=console)
