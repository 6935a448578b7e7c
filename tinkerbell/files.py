"""Files of which only their owner reads anything, whatever the umask says: what a server and its commands write are
tenants' data, or keys to it."""

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
OTHERS = 0o077
"""Bits of everybody but the owner."""


def make_directory(path: Path) -> None:
    """Make it, and those above it that are missing; what is there stays as it is."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(DIRECTORY_MODE, exist_ok=True)


def open_private(path: Path, mode: str, **options: Any) -> IO[Any]:
    """`open` for writing."""
    return open(path, mode, opener=_opener, **options)


def write_private(path: Path, content: bytes | str) -> None:
    """The whole file; text in UTF-8."""
    with open_private(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def is_loose(path: Path) -> bool:
    """Whether somebody but its owner may do anything with it."""
    return bool(stat.S_IMODE(path.stat().st_mode) & OTHERS)


def tighten(paths: Iterable[Path]) -> Iterator[tuple[Path, bool]]:
    """Take from everybody but the owner what they may do with these files and directories, of those that are there.
    Gives the loose ones, and whether they still are: what belongs to another user cannot be changed.

    A directory that is everybody's (sticky, as /tmp) stays it.
    """
    for path in paths:
        if not path.exists() or not is_loose(path) or path.stat().st_mode & stat.S_ISVTX:
            continue
        try:
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~OTHERS)
        except PermissionError:
            yield path, True
        else:
            yield path, False


def _opener(path: str, flags: int) -> int:
    descriptor = os.open(path, flags, FILE_MODE)
    found = os.fstat(descriptor).st_mode
    # A file that was there keeps its mode; and /dev/stdout is not ours to change.
    if stat.S_ISREG(found) and stat.S_IMODE(found) & OTHERS:
        os.fchmod(descriptor, FILE_MODE)
    return descriptor
