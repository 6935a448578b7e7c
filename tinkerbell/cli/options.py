"""Options that many commands share: where the log is, where the server is, how to print."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinkerbell.config import Settings, load_settings
from tinkerbell.errors import InvalidRequest

if TYPE_CHECKING:
    from tinkerbell.events.store import EventStore

MAX_INTEGER = 2**63 - 1
"""The largest that a database holds."""

PIPE_WIDTH = 400
"""Columns of a table that no terminal shows."""

Command = TypeVar("Command", bound=Callable[..., Any])


def log_options(command: Command) -> Command:
    """--config, --data-dir and --database-url: which log."""
    for option in (
        click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="TOML file of settings."),
        click.option("--data-dir", help="Directory of the SQLite file and the blobs.  [default: tinkerbell-data]"),
        click.option(
            "--database-url",
            help="postgresql://... or sqlite:///...  [default: the file in the data directory]",
        ),
    ):
        command = option(command)
    return command


def json_option(command: Command) -> Command:
    """--json: one JSON document on standard output, for scripts."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")(command)


def settings_of(config: Path | None, **overrides: Any) -> Settings:
    """Settings of a command; a wrong value is a usage error (exit status 2)."""
    try:
        return load_settings(config, **overrides)
    except InvalidRequest as exc:
        raise click.UsageError(exc.detail) from exc


def open_store(config: Path | None, data_dir: str | None, database_url: str | None) -> "EventStore":
    """The log of an existing server. Raises NotFound if there is none: looking at a log must not make one."""
    from tinkerbell.cli.database import require_log
    from tinkerbell.events.store import EventStore

    settings = settings_of(config, data_dir=data_dir, database_url=database_url)
    require_log(settings)
    return EventStore.open(settings)


def print_json(value: Any) -> None:
    """One JSON document, structs included."""
    click.echo(json.dumps(msgspec.to_builtins(value), indent=2, ensure_ascii=False))


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, console: Console | None = None
) -> None:
    """A table; numbers to the right. Text is shown as it is, never as markup."""
    table = Table(title=Text(title), title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        numbers = bool(rows) and all(isinstance(row[index], int | float) or row[index] is None for row in rows)
        table.add_column(Text(column), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(value)) for value in row))
    (console or wide_console()).print(table)


def wide_console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; into a file or a pipe nothing is folded."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=PIPE_WIDTH)


def cell(value: Any) -> str:
    """One value for a person: counts with thousands marks, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def when(at_us: int | None) -> str:
    """Microseconds since 1970 as RFC 3339 UTC with seconds."""
    from datetime import UTC, datetime

    return "" if at_us is None else datetime.fromtimestamp(at_us / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
