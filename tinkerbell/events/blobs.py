"""Content-addressed bytes in files: `ab/cd/<sha256>`, durable before the event that names them."""

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec

from tinkerbell.errors import Corrupt, Unavailable
from tinkerbell.files import make_directory

_DIGEST = re.compile("[0-9a-f]{64}")
_PART = re.compile("[0-9a-f]{2}")
_HALF = "tmp-"
"""How files begin that are being written, or whose writer died."""


class BlobFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the store as it was seen."""

    digest: str
    """sha256 (hex) by its name."""
    num_bytes: int
    mtime_ns: int
    """Of its last write or the last time it was to be written again."""


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BlobStore:
    """Blobs under one directory; any number of threads and processes may use it at once."""

    def __init__(self, directory: Path) -> None:
        self._root = directory

    def path(self, digest: str) -> Path:
        """Where the blob with this hash (hex) is or would be."""
        return self._root / digest[:2] / digest[2:4] / digest

    def put(self, data: bytes) -> bytes:
        """Keep `data`; returns its sha256. On return it survives a crash of the process and of the machine.

        A crash in the middle leaves a file that starts with `tmp-`, never half a blob.
        """
        return self.add(data)[0]

    def add(self, data: bytes) -> tuple[bytes, BlobFile | None]:
        """`put`, and the file if it was not there before."""
        digest = hashlib.sha256(data)
        target = self.path(digest.hexdigest())
        if self._has(target, data):
            self._sync_path(target)
            return digest.digest(), None
        make_directory(target.parent)
        descriptor, name = tempfile.mkstemp(prefix=_HALF, dir=target.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                written = os.fstat(file.fileno())
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            raise
        self._sync_path(target)
        return digest.digest(), BlobFile(digest=digest.hexdigest(), num_bytes=len(data), mtime_ns=written.st_mtime_ns)

    def _has(self, target: Path, data: bytes) -> bool:
        """Whether the blob is there and whole: one that has rotted is written again. It is as good as new then."""
        try:
            if target.stat().st_size != len(data) or target.read_bytes() != data:
                return False
            os.utime(target)
        except FileNotFoundError:
            return False
        return True

    def get(self, digest: str) -> bytes:
        """The bytes with this hash (hex). Raises Corrupt when they are missing or changed, Unavailable where the
        operating system did not give them: too many open files say nothing of the blob."""
        try:
            data = self.path(digest).read_bytes()
        except FileNotFoundError as exc:
            raise Corrupt(f"blob {digest} is missing from {self._root}") from exc
        except (NotADirectoryError, IsADirectoryError) as exc:
            raise Corrupt(f"blob {digest} cannot be read: {exc}") from exc
        except OSError as exc:
            raise Unavailable(f"blob {digest} cannot be read now: {exc}") from exc
        if hashlib.sha256(data).hexdigest() != digest:
            raise Corrupt(f"blob {digest} has other bytes than were written")
        return data

    def head(self, digest: str, num_bytes: int) -> bytes:
        """The first bytes of the blob with this hash (hex); none where it is missing."""
        try:
            with self.path(digest).open("rb") as file:
                return file.read(num_bytes)
        except FileNotFoundError:
            return b""

    def exists(self, digest: str) -> bool:
        """Whether there is a file of this hash (hex), whole or not."""
        return self.path(digest).exists()

    # ---- what is there -----------------------------------------------------------------------------------------------

    def parts(self) -> list[str]:
        """Names of the parts that the store has by now, at most 256."""
        return sorted(entry.name for entry in os.scandir(self._root) if _PART.fullmatch(entry.name))

    def files(self, part: str) -> Iterator[BlobFile]:
        """Every blob of a part that is there."""
        for entry in self._entries(part):
            if _DIGEST.fullmatch(entry.name) and (found := _seen(Path(entry.path))) is not None:
                yield found

    def halves(self, part: str) -> Iterator[tuple[Path, os.stat_result]]:
        """What is being written, or was when its writer died."""
        for entry in self._entries(part):
            if entry.name.startswith(_HALF):
                with contextlib.suppress(FileNotFoundError):  # it has its name by now
                    yield Path(entry.path), entry.stat()

    def find(self, digest: str) -> BlobFile | None:
        """The file of this hash (hex), if there is one."""
        return _seen(self.path(digest))

    def remove(self, file: BlobFile) -> bool:
        """Remove it if it is still as it was seen; whether it was. A crash may undo it."""
        path = self.path(file.digest)
        if _seen(path) != file:
            return False
        path.unlink(missing_ok=True)
        return True

    def sync(self, digests: Collection[str]) -> None:
        """Make it durable that these were removed."""
        for directory in {self.path(digest).parent for digest in digests}:
            if directory.exists():
                _sync_directory(directory)

    def _entries(self, part: str) -> Iterator["os.DirEntry[str]"]:
        if not (self._root / part).is_dir():
            return
        for inner in os.scandir(self._root / part):
            if _PART.fullmatch(inner.name):
                yield from os.scandir(inner.path)

    def _sync_path(self, target: Path) -> None:
        """Make the names on the way to `target` durable, whoever made them: another writer may not have yet."""
        for directory in (target.parent, target.parent.parent, self._root, self._root.parent):
            _sync_directory(directory)


def _seen(path: Path) -> BlobFile | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return BlobFile(digest=path.name, num_bytes=found.st_size, mtime_ns=found.st_mtime_ns)
