"""The files of an archive that anybody may have made: read in a stream, within limits, and nothing followed.

What an archive says of itself is believed only as far as it is cheap: how many files there are is read from its end
before the list of them, their sizes are summed before one is opened, and a file is read up to the size that was said.
"""

import hashlib
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from tinkerbell.errors import Corrupt, InvalidRequest
from tinkerbell.files import make_directory, open_private

MAX_FILES = 1_000_000
MAX_LIST_BYTES = 256 * 1024 * 1024
"""Of the names and sizes of all files."""
MAX_FILE_BYTES = 64 * 1024**3
MAX_TOTAL_BYTES = 4 * 1024**4
MAX_RATIO = 100
"""Of all files to the archive. Text shrinks to a tenth, numbers do not, and a fresh adapter is a third of them."""
SMALL_BYTES = 64 * 1024 * 1024
"""Up to so much may come of any archive."""
CHUNK_BYTES = 1024 * 1024
MAX_LINE_BYTES = 64 * 1024 * 1024

UNREADABLE = (
    OSError, KeyError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError,
    RuntimeError, OverflowError,
)  # fmt: skip
"""What zipfile raises for what it cannot read: damaged, cut off, encrypted, or compressed in another way."""

_END = struct.Struct("<4s4H2LH")
_END_SIGNATURE = b"PK\5\6"
_LOCATOR = struct.Struct("<4sLQL")
_LOCATOR_SIGNATURE = b"PK\6\7"
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_SIGNATURE = b"PK\6\6"


class Files(Protocol):
    """Where the files of an archive are."""

    def open(self, name: str) -> IO[bytes]:
        """Raises one of UNREADABLE."""
        ...

    def size(self, name: str) -> int:
        """Bytes that `open` gives at most. Raises one of UNREADABLE."""
        ...

    def close(self) -> None: ...


class ZipFiles:
    """Those of a zip file."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidRequest for what is no archive, or more than the limits."""
        self._path = path
        try:
            self._require_short_list(path)
            self._zip = zipfile.ZipFile(path)
        except UNREADABLE as exc:
            raise InvalidRequest(f"{path} is not an exported run: {exc}") from exc
        try:
            self._require_limits()
        except BaseException:
            self._zip.close()
            raise

    def open(self, name: str) -> IO[bytes]:
        return self._zip.open(name)

    def size(self, name: str) -> int:
        return self._zip.getinfo(name).file_size

    def close(self) -> None:
        self._zip.close()

    def _require_short_list(self, path: Path) -> None:
        num_files, num_bytes = _list_of(path)
        if num_files > MAX_FILES or num_bytes > MAX_LIST_BYTES:
            raise InvalidRequest(f"{path} has {num_files} files; an exported run has {MAX_FILES} at most")

    def _require_limits(self) -> None:
        infos = self._zip.infolist()
        if len(infos) > MAX_FILES:
            raise InvalidRequest(f"{self._path} has {len(infos)} files; an exported run has {MAX_FILES} at most")
        if len({info.filename for info in infos}) < len(infos):
            raise InvalidRequest(f"{self._path} has two files of one name")
        for info in infos:
            if stat.S_ISLNK(info.external_attr >> 16):
                raise InvalidRequest(f"{self._path} has a link, {info.filename[:100]!r}; an exported run has none")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InvalidRequest(f"{self._path}: {info.filename[:100]!r} is compressed in another way than deflate")
            if info.file_size > MAX_FILE_BYTES:
                raise InvalidRequest(f"{self._path}: {info.filename[:100]!r} would have {info.file_size} bytes")
        # Against the file itself: the list can say anything, and let many names share the same bytes.
        total, held = sum(info.file_size for info in infos), self._path.stat().st_size
        if total > MAX_TOTAL_BYTES or total > max(SMALL_BYTES, MAX_RATIO * held):
            raise InvalidRequest(
                f"{self._path} has {held} bytes and would become {total}, more than {MAX_RATIO} times as many: it is"
                " no exported run"
            )


class DirectoryFiles:
    """Those of a directory that `unpack` made."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self, name: str) -> IO[bytes]:
        for above in Path(name).parents:
            if (self._root / above).is_symlink() and above != Path():
                raise OSError(f"{above} is a link")
        # Neither a link nor a pipe: reading those could lead anywhere, or never end.
        descriptor = os.open(self._root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(f"{name} is no file")
        return os.fdopen(descriptor, "rb")

    def size(self, name: str) -> int:
        return (self._root / name).lstat().st_size

    def close(self) -> None:
        """Nothing is open."""


def chunks(files: Files, name: str, digest: str | None, *, limit: int = MAX_FILE_BYTES) -> Iterator[bytes]:
    """A file in parts. Raises Corrupt where it is longer than `limit`, and, after the last part, where it has another
    sha256 (hex)."""
    hashed = hashlib.sha256()
    try:
        if (size := files.size(name)) > limit:
            raise Corrupt(f"{name} has {size} bytes, more than the {limit} that are read of it")
        with files.open(name) as file:
            while part := file.read(CHUNK_BYTES):
                hashed.update(part)
                yield part
    except UNREADABLE as exc:
        raise Corrupt(f"{name} cannot be read: {exc}") from exc
    if digest is not None and hashed.hexdigest() != digest:
        raise Corrupt(f"{name} has other bytes than were exported")


def lines(parts: Iterator[bytes], name: str) -> Iterator[bytes]:
    """The lines of a file in parts, without their ends. Raises Corrupt for one that does not end."""
    rest = b""
    for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        yield from whole
        if len(rest) > MAX_LINE_BYTES:
            raise Corrupt(f"{name} has a line of more than {MAX_LINE_BYTES} bytes")
    if rest:
        yield rest


def require_room(files: Files, names: Iterator[str], directory: Path) -> None:
    """Raise InvalidRequest where these files do not fit on the disk of a directory."""
    needed, free = sum(files.size(name) for name in names), shutil.disk_usage(directory).free
    if needed > free:
        raise InvalidRequest(f"the archive becomes {needed} bytes, and {directory} has room for {free}")


def copy(parts: Iterator[bytes], path: Path) -> None:
    """Write a file in parts."""
    make_directory(path.parent)
    with open_private(path, "wb") as file:
        for part in parts:
            file.write(part)


def _list_of(path: Path) -> tuple[int, int]:
    """(files, bytes of the list of them) as the end of a zip file says. Raises one of UNREADABLE."""
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        start = max(0, length - _END.size - 0xFFFF - _LOCATOR.size)
        file.seek(start)
        tail = file.read()
        at = tail.rfind(_END_SIGNATURE)
        if at < 0 or len(tail) - at < _END.size:
            raise zipfile.BadZipFile("it does not end as a zip file does; was it cut off?")
        _, _, _, _, num_files, num_bytes, _, _ = _END.unpack_from(tail, at)
        before = at - _LOCATOR.size
        if before >= 0 and tail[before : before + 4] == _LOCATOR_SIGNATURE:
            file.seek(_LOCATOR.unpack_from(tail, before)[2])
            end64 = _END64.unpack(file.read(_END64.size))
            if end64[0] == _END64_SIGNATURE:
                num_files, num_bytes = end64[7], end64[8]
    return num_files, num_bytes
