"""What the replay commands share: where a run is, with what it is executed, and a bar while that lasts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from tinkerbell.cli.options import settings_of
from tinkerbell.errors import TinkerbellError

if TYPE_CHECKING:
    from tinkerbell.replay import Difference, ExecutorChoice, Finding, Log
    from tinkerbell.replay.integrity import Tell

Command = TypeVar("Command", bound=Callable[..., Any])

EQUAL, DIVERGED, UNKNOWN = 0, 1, 2
"""Exit statuses of the commands that execute a run."""

STATUSES = "Exit status: 0 as recorded, 1 not as recorded, 2 it could not be executed (standard error says why)."


def executor_options(command: Command) -> Command:
    """--executor, --model, --threads, --executor-option: another executor than the recorded one; --trust-archive."""
    for option in (
        click.option(
            "--trust-archive", is_flag=True,
            help="Execute an exported run with the executor, model and options that it names.",
        ),
        click.option(
            "--executor-option", "pairs", multiple=True, metavar="NAME=VALUE",
            help="Setting of the executor; can be given several times.  [default: as recorded]",
        ),
        click.option("--threads", type=click.IntRange(min=1), help="Of the executor.  [default: as recorded]"),
        click.option("--model", help="As in tinkerbell serve.  [default: as recorded]"),
        click.option("--executor", help="Entry point of an executor.  [default: as recorded]"),
    ):  # fmt: skip
        command = option(command)
    return command


def choice_of(
    executor: str | None, model: str | None, threads: int | None, pairs: Sequence[str], trust_archive: bool
) -> "ExecutorChoice":
    """The executor that was asked for."""
    from tinkerbell.config import name_and_value
    from tinkerbell.replay import ExecutorChoice

    options = dict(map(name_and_value, pairs)) if pairs else None
    return ExecutorChoice(executor=executor, model=model, threads=threads, options=options, trusting=trust_archive)


@contextmanager
def log_of(
    run: str, config: Path | None, data_dir: str | None, database_url: str | None
) -> Iterator[tuple["Log", str]]:
    """(log, run) of a RUN: an archive that is there under this name, else a run of the server's log."""
    from tinkerbell.replay import ArchiveLog, DatabaseLog

    path = Path(run)
    log: Log
    if path.is_file() or (path.is_dir() and (path / "manifest.json").is_file()):
        log = archive = ArchiveLog.open(path)
        run = archive.manifest.run
    else:
        log = DatabaseLog.open(settings_of(config, data_dir=data_dir, database_url=database_url))
    try:
        yield log, run
    finally:
        log.close()


@contextmanager
def progress(title: str) -> Iterator["Tell"]:
    """A bar on the terminal's standard error; nothing in a pipe."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def tell(what: str, done: float, total: float) -> None:
            bar.update(task, description=f"{title}: {what}", completed=done, total=total)

        yield tell


class CannotExecute(click.ClickException):
    """Nothing is known about the run."""

    exit_code = UNKNOWN

    def show(self, file: IO[Any] | None = None) -> None:
        """One line on standard error, as for every other failure."""
        from tinkerbell.cli.main import fail

        fail("The run cannot be executed.", self.message)


@contextmanager
def unknown_is_2() -> Iterator[None]:
    """What keeps a run from being executed is one line on standard error and exit status 2."""
    try:
        yield
    except TinkerbellError as exc:
        raise CannotExecute(exc.detail) from exc
    except OSError as exc:
        raise CannotExecute(str(exc)) from exc


def tell_differences(console: Console, differences: "Sequence[Difference]") -> None:
    """Why bits were not compared."""
    if differences:
        console.print(Text("The environment is not the recorded one, so numbers are compared within bounds:"))
    for each in differences:
        console.print(Text(f"  {each.fact}: recorded {each.recorded}, here {each.found}"))


def tell_findings(console: Console, findings: "Sequence[Finding]") -> None:
    """What is not as recorded, the first first."""
    for number, each in enumerate(findings):
        style = "bold red" if number == 0 else "red"
        lead = "first divergence: " if number == 0 else "  then "
        console.print(Text(lead + each.text, style=style))
