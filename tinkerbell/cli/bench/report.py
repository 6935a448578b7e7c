"""How a benchmark tells its result: machine and parameters, a table, what was expected; JSON if asked."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from tinkerbell.cli.bench.machine import Machine
from tinkerbell.cli.options import print_table, wide_console
from tinkerbell.files import write_private

Command = TypeVar("Command", bound=Callable[..., Any])
Rows = list[dict[str, Any]]
"""Of a table: column -> value."""


class Expectation(msgspec.Struct, frozen=True, kw_only=True):
    """A number this release is held to."""

    what: str
    measured: float
    bound: str
    met: bool


def at_least(what: str, measured: float, bound: float) -> Expectation:
    """Met from `bound` upwards."""
    return Expectation(what=what, measured=measured, bound=f">= {bound:g}", met=measured >= bound)


def at_most(what: str, measured: float, bound: float) -> Expectation:
    """Met up to `bound`."""
    return Expectation(what=what, measured=measured, bound=f"<= {bound:g}", met=measured <= bound)


def holds(what: str, met: bool) -> Expectation:
    """Something that is so or not."""
    return Expectation(what=what, measured=float(met), bound="1 for yes", met=met)


def below(what: str, measured: float, bound: float) -> Expectation:
    """Met under `bound`."""
    return Expectation(what=what, measured=measured, bound=f"< {bound:g}", met=measured < bound)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one run of a benchmark found."""

    benchmark: str
    parameters: dict[str, Any]
    machine: Machine
    rows: Rows
    expectations: list[Expectation]
    tables: dict[str, Rows] = {}
    """What was measured besides: title -> rows, all with the same columns."""


def json_file_option(command: Command) -> Command:
    """--json FILE, `-` for standard output."""
    return click.option(
        "--json",
        "json_file",
        type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
        help="Write JSON there.",
    )(command)


def publish(report: Report, columns: Sequence[str], json_file: Path | None) -> None:
    """Print the report and write its JSON. An expectation that is not met is exit status 1."""
    # With JSON on standard output the words go beside it.
    console = wide_console(stderr=str(json_file) == "-")
    facts = msgspec.to_builtins(report.machine)
    console.print(
        "machine     " + ", ".join(f"{name} {value}" for name, value in facts.items()),
        markup=False,
        highlight=False,
    )
    parameters = ", ".join(f"{name} {value}" for name, value in report.parameters.items())
    console.print("parameters  " + parameters, markup=False, highlight=False)
    for title, names, rows in (
        (f"bench {report.benchmark}", columns, report.rows),
        *((title, tuple(rows[0]), rows) for title, rows in report.tables.items() if rows),
    ):
        cells = [[row.get(name) for name in names] for row in rows]
        print_table(title, [name.replace("_", " ") for name in names], cells, console=console)
    for expectation in report.expectations:
        verdict = "[green]as expected[/]" if expectation.met else "[bold red]NOT as expected[/]"
        console.print(
            f"{verdict}  {expectation.what}: {expectation.measured:.3g} ({expectation.bound})",
            highlight=False,
        )
    if json_file is not None:
        text = msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"
        if str(json_file) == "-":
            click.echo(text, nl=False)
        else:
            write_private(json_file, text)
    if not all(expectation.met for expectation in report.expectations):
        raise SystemExit(1)
