"""Finds executor classes by name, through the entry point group `tinkerbell.executors`."""

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from tinkerbell.errors import InvalidRequest, MissingPackage, ServerError
from tinkerbell.executors.port import Executor
from tinkerbell.executors.protocol import ExecutorOptions

GROUP = "tinkerbell.executors"
DISTRIBUTION = "tinkerbell-server"


def kinds() -> list[str]:
    """Names that can be asked for; whether their dependencies are installed shows only in `load`."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def load(kind: str) -> Callable[[ExecutorOptions], Executor]:
    """The executor class of that name.

    Raises InvalidRequest for an unknown name and MissingPackage, with the install command, where a package it
    imports is not installed.
    """
    for point in entry_points(group=GROUP):
        if point.name == kind:
            return _import(point)
    raise InvalidRequest(f"executor `{kind}` is not one of {', '.join(kinds())}")


def _import(point: EntryPoint) -> Callable[[ExecutorOptions], Executor]:
    try:
        found: Callable[[ExecutorOptions], Executor] = point.load()
    except ModuleNotFoundError as exc:
        name = exc.name or str(exc)
        if name.partition(".")[0] == "tinkerbell":
            raise ServerError(f"executor `{point.name}` is not part of this installation: no module {name}") from exc
        raise MissingPackage(
            f"executor `{point.name}` needs the package `{name}`: {_command(point)}", package=name
        ) from exc
    return found


def _command(point: EntryPoint) -> str:
    name = point.dist.name if point.dist is not None else DISTRIBUTION
    extra = f"[{point.name}]" if name == DISTRIBUTION else ""
    return f'pip install "{name}{extra}"'
