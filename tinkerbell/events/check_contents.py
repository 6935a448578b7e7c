"""Part of the check: bodies and blobs (I13, I14)."""

import hashlib
from typing import NoReturn

import sqlalchemy as sa
from sqlalchemy import RowMapping

from tinkerbell.errors import Corrupt
from tinkerbell.events import tables as t
from tinkerbell.events.blobs import BlobStore


class Contents:
    """Follows the log event by event; each blob is read once."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._lengths: dict[bytes, int] = {}
        self._num_names = 0

    @property
    def num_blobs(self) -> int:
        """Blobs read."""
        return len(self._lengths)

    @property
    def num_bytes(self) -> int:
        """Their bytes."""
        return sum(self._lengths.values())

    def see(self, row: RowMapping, named: dict[str, bytes]) -> None:
        """Check the body and the blobs of the next event."""
        if len(named) != row["num_blobs"]:
            _refuse(row["position"], f"it names {row['num_blobs']} blobs, there are {len(named)}")
        self._num_names += len(named)
        if row["body"] is not None:
            # SQLite would let somebody put text into a column of bytes.
            if not isinstance(row["body"], bytes) or hashlib.sha256(row["body"]).digest() != row["body_hash"]:
                _refuse(row["position"], "its body has other bytes than were written")
        elif row["body_hash"] is not None and named.get("body") != row["body_hash"]:
            _refuse(row["position"], "its body is missing")
        for digest in named.values():
            if digest not in self._lengths:
                try:
                    self._lengths[digest] = len(self._blobs.get(digest.hex()))
                except Corrupt as exc:
                    _refuse(row["position"], exc.detail)

    def end(self, connection: sa.Connection) -> None:
        """Check the tables of blobs: they have what the events name, and nothing else."""
        num_names = connection.execute(sa.select(sa.func.count()).select_from(t.event_blobs)).scalar_one()
        if num_names != self._num_names:
            raise Corrupt(f"I13: {num_names - self._num_names} blob names belong to no event", invariant="I13")
        stored = {row.hash: (row.length, row.location) for row in connection.execute(sa.select(t.blobs))}
        read = {digest: (length, "file") for digest, length in self._lengths.items()}
        if stored != read:
            wrong = min((key for key in stored.keys() | read.keys() if stored.get(key) != read.get(key)), key=repr)
            name = wrong.hex() if isinstance(wrong, bytes) else repr(wrong)
            raise Corrupt(f"I14: blob {name} is not in the table as it is in the store", invariant="I14")


def _refuse(position: int, why: str) -> NoReturn:
    raise Corrupt(f"I14 at position {position}: {why}", invariant="I14", position=position)
