"""`tinkerbell db`: the schema of the log's database, and old bulk in it."""

from pathlib import Path

import click

from tinkerbell.cli.compact import compact
from tinkerbell.cli.options import json_option, log_options, print_json, settings_of


@click.group()
def db() -> None:
    """Upgrade the database's schema and see what state it is in; take old bulk out.

    \b
    tinkerbell db status
    tinkerbell db upgrade --database-url postgresql:///tinkerbell
    tinkerbell db compact --older-than 30d --dry-run
    """


db.add_command(compact)


@db.command()
@log_options
@json_option
def upgrade(config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool) -> None:
    """Bring the schema to this release's; makes the database's tables if there are none.

    \b
    tinkerbell db upgrade
    """
    from tinkerbell.cli.database import shown
    from tinkerbell.events import schema

    settings = settings_of(config, data_dir=data_dir, database_url=database_url)
    schema.upgrade(settings.url)
    if as_json:
        print_json({"url": shown(settings.url), "schema": "current"})
    else:
        click.echo(f"{shown(settings.url)} is at this release's schema.")


@db.command()
@log_options
@json_option
def status(config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool) -> None:
    """Say whether the schema is missing, outdated or current. Exit status 1 unless it is current.

    \b
    tinkerbell db status || tinkerbell db upgrade
    """
    from tinkerbell.cli.database import shown
    from tinkerbell.events import schema

    settings = settings_of(config, data_dir=data_dir, database_url=database_url)
    state = "current" if schema.is_current(settings.url) else "outdated"
    if schema.is_empty(settings.url):
        state = "missing"
    if as_json:
        print_json({"url": shown(settings.url), "schema": state})
    else:
        click.echo(f"{shown(settings.url)}: schema {state}")
    if state != "current":
        raise SystemExit(1)


@db.command()
@log_options
@json_option
def check(config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool) -> None:
    """Verify the whole log: the same as `tinkerbell audit verify`.

    \b
    tinkerbell db check
    """
    from tinkerbell.cli.audit import verify_log

    verify_log(config, data_dir, database_url, as_json)
