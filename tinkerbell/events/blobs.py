"""Content-addressed bytes in files: `ab/cd/<sha256>`, durable before the event that names them."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from tinkerbell.errors import Corrupt


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
        digest = hashlib.sha256(data)
        target = self.path(digest.hexdigest())
        if self._has(target, data):
            self._sync_path(target)
            return digest.digest()
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="tmp-", dir=target.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            raise
        self._sync_path(target)
        return digest.digest()

    def _has(self, target: Path, data: bytes) -> bool:
        """Whether the blob is there and whole: one that has rotted is written again."""
        try:
            return target.stat().st_size == len(data) and target.read_bytes() == data
        except FileNotFoundError:
            return False

    def get(self, digest: str) -> bytes:
        """The bytes with this hash (hex). Raises Corrupt when they are missing, unreadable or changed."""
        try:
            data = self.path(digest).read_bytes()
        except FileNotFoundError as exc:
            raise Corrupt(f"blob {digest} is missing from {self._root}") from exc
        except OSError as exc:
            raise Corrupt(f"blob {digest} cannot be read: {exc}") from exc
        if hashlib.sha256(data).hexdigest() != digest:
            raise Corrupt(f"blob {digest} has other bytes than were written")
        return data

    def exists(self, digest: str) -> bool:
        """Whether there is a file of this hash (hex), whole or not."""
        return self.path(digest).exists()

    def delete(self, digest: str) -> bool:
        """Delete the blob with this hash (hex), durably; whether it was there."""
        path = self.path(digest)
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        _sync_directory(path.parent)
        return True

    def _sync_path(self, target: Path) -> None:
        """Make the names on the way to `target` durable, whoever made them: another writer may not have yet."""
        for directory in (target.parent, target.parent.parent, self._root, self._root.parent):
            _sync_directory(directory)
