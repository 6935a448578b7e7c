"""Files of the blob store that no event needs leave it while servers append.

A blob is written before its event, so a refused submit, a repeated one or a crash leaves a file that nothing names. Two
rules make it safe to remove one, whatever other processes do and whoever is killed where:

1. A file goes only under the append lock, and only if no committed event needs it.
2. An append looks under the same lock whether its files are there, before it is written (writer.py).

So an append that names a file either comes first, and the file is needed, or second, and is refused. No clock decides:
that a file must have some age before it goes only spares submits that are under way from being refused.
"""

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence

import msgspec
import sqlalchemy as sa

from tinkerbell.events import facts, removal
from tinkerbell.events.blobs import BlobFile, BlobStore
from tinkerbell.events.statements import Statements

log = logging.getLogger(__name__)

AT_ONCE = 32
"""Most files that go while the append lock is held, for which others wait,"""
LOCKED_S = 0.02
"""and about for how long: a large file takes its time."""


class Swept(msgspec.Struct, frozen=True, kw_only=True):
    """What left the blob store."""

    num_files: int = 0
    num_bytes: int = 0

    def __add__(self, other: "Swept") -> "Swept":
        return Swept(num_files=self.num_files + other.num_files, num_bytes=self.num_bytes + other.num_bytes)


class Sweeper:
    """Works on the engines and the blob store of one event store, from any thread."""

    def __init__(self, writer: sa.Engine, reader: sa.Engine, blobs: BlobStore) -> None:
        self._writer = writer
        self._reader = reader
        self._blobs = blobs

    def sweep(self, older_than_s: float, parts: Iterable[str] | None = None) -> Swept:
        """Remove every file that no event needs and that has lain there for so long, halves of files too. `parts`: of
        the store; None: all of it."""
        before_ns = time.time_ns() - round(older_than_s * 1e9)
        swept = Swept()
        for part in self._blobs.parts() if parts is None else parts:
            swept += self._remove_halves(part, before_ns)
            old = [file for file in self._blobs.files(part) if file.mtime_ns < before_ns]
            swept += self.remove(list(self._unneeded(old)))
        return swept

    def parts(self) -> list[str]:
        """Of the blob store."""
        return self._blobs.parts()

    def drop(self, files: Sequence[BlobFile]) -> None:
        """Remove what was written for a submit that came to nothing."""
        try:
            self.remove(files)
        except Exception as exc:  # noqa: BLE001 - nobody waits for it, and the sweep takes them some time
            log.warning("%d files of refused submits stay until they are swept: %s", len(files), exc)

    def remove(self, files: Sequence[BlobFile]) -> Swept:
        """Those of these files that no event needs, unless they were written anew since they were seen."""
        swept, left = Swept(), list(files)
        while left:
            part = left[:AT_ONCE]
            with self._writer.begin() as connection:
                facts.lock_head(Statements(connection))
                until_s = time.monotonic() + LOCKED_S
                needed = removal.needed(connection, [bytes.fromhex(file.digest) for file in part])
                going = [file for file in part if bytes.fromhex(file.digest) not in needed]
                # Nobody shares a blob that may be gone.
                removal.mark_removed(connection, [bytes.fromhex(file.digest) for file in going])
                left = left[AT_ONCE:]
                while going:
                    file = going.pop()
                    if self._blobs.remove(file):
                        swept += Swept(num_files=1, num_bytes=file.num_bytes)
                    if time.monotonic() > until_s:
                        left = going + left
                        break
        return swept

    def remove_digests(self, digests: Collection[str]) -> Swept:
        """The same by their hashes (hex), durably."""
        swept = self.remove([file for file in map(self._blobs.find, digests) if file is not None])
        self._blobs.sync(digests)
        return swept

    def _remove_halves(self, part: str, before_ns: int) -> Swept:
        """No event can name these: a writer that still lives begins anew."""
        swept = Swept()
        for path, found in self._blobs.halves(part):
            if found.st_mtime_ns < before_ns:
                path.unlink(missing_ok=True)
                swept += Swept(num_files=1, num_bytes=found.st_size)
        return swept

    def _unneeded(self, files: Sequence[BlobFile]) -> Iterator[BlobFile]:
        """As of now, without the lock: most files are needed."""
        if not files:
            return
        with self._reader.connect() as connection:
            needed = removal.needed(connection, [bytes.fromhex(file.digest) for file in files])
        yield from (file for file in files if bytes.fromhex(file.digest) not in needed)
