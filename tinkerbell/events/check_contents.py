"""Part of the check: every body and blob is there and is what was written (I14), no blob's name is left over (I13), and
what was erased is gone (I16)."""

import hashlib
from typing import NoReturn

import sqlalchemy as sa
from sqlalchemy import RowMapping

from tinkerbell.errors import Corrupt
from tinkerbell.events import tables as t
from tinkerbell.events.blobs import BlobStore
from tinkerbell.events.removal import FILE, REMOVED, living_keys_of_erased


class Contents:
    """Follows the log event by event. Every blob is read once."""

    def __init__(self, blobs: BlobStore, connection: sa.Connection) -> None:
        self.num_removed = 0
        self._blobs = blobs
        self._lengths: dict[bytes, int] = {}
        """Of the blobs that some event still needs."""
        self._erased: set[bytes] = set()
        self._compacted: set[bytes] = set()
        """Blobs that an event named whose bulk is gone."""
        self._num_names = 0
        # Both are compared with the log in the end, as every projection is.
        self._erasures = {row.tenant: row.position for row in connection.execute(sa.select(t.erasures))}
        self._removed = set(connection.execute(sa.select(t.removed_bulk.c.position)).scalars())

    @property
    def num_blobs(self) -> int:
        """Blobs read."""
        return len(self._lengths)

    @property
    def num_bytes(self) -> int:
        """Their bytes."""
        return sum(self._lengths.values())

    def see(self, row: RowMapping, named: dict[str, bytes]) -> bytes | None:
        """Check the body and the blobs of the next event. Returns its body as it is stored, if it has one."""
        if len(named) != row["num_blobs"]:
            _refuse(row["position"], f"it names {row['num_blobs']} blobs, there are {len(named)}")
        self._num_names += len(named)
        erased = self._erasures.get(row["tenant"], 0) > row["position"]
        gone = erased or row["position"] in self._removed
        self.num_removed += gone and (row["body_hash"] is not None or bool(named))
        if row["body"] is not None:
            # SQLite would let somebody put text into a column of bytes.
            if not isinstance(row["body"], bytes) or hashlib.sha256(row["body"]).digest() != row["body_hash"]:
                _refuse(row["position"], "its body has other bytes than were written")
            if erased:
                _unfinished(row["tenant"], f"event {row['position']} has its body")
        elif not gone and row["body_hash"] is not None and named.get("body") != row["body_hash"]:
            _refuse(row["position"], "its body is missing")
        if gone:
            (self._erased if erased else self._compacted).update(named.values())
            return None
        body: bytes | None = row["body"]
        for name, digest in named.items():
            if digest not in self._lengths:
                try:
                    data = self._blobs.get(digest.hex())
                except Corrupt as exc:
                    _refuse(row["position"], exc.detail)
                self._lengths[digest] = len(data)
                body = data if name == "body" else body
        return body

    def end(self, connection: sa.Connection) -> None:
        """Check the tables of blobs: they have what the events name, and nothing else."""
        num_names = connection.execute(sa.select(sa.func.count()).select_from(t.event_blobs)).scalar_one()
        if num_names != self._num_names:
            raise Corrupt(f"I13: {num_names - self._num_names} blob names belong to no event", invariant="I13")
        gone = (self._erased | self._compacted) - self._lengths.keys()
        stored = {row.hash: (row.length, row.location) for row in connection.execute(sa.select(t.blobs))}
        living = {digest: found for digest, found in stored.items() if digest not in gone}
        read = {digest: (length, FILE) for digest, length in self._lengths.items()}
        if living != read:
            wrong = min((key for key in living.keys() | read.keys() if living.get(key) != read.get(key)), key=repr)
            name = wrong.hex() if isinstance(wrong, bytes) else repr(wrong)
            raise Corrupt(f"I14: blob {name} is not in the table as it is in the store", invariant="I14")
        for digest in gone:
            # A compaction that was cut short leaves blobs that nobody needs; the next one takes them.
            if digest not in stored or stored[digest][1] not in (FILE, REMOVED):
                raise Corrupt(f"I14: blob {digest.hex()} is not in the table", invariant="I14")
            if digest in self._erased and (stored[digest][1] != REMOVED or self._blobs.exists(digest.hex())):
                _unfinished(None, f"blob {digest.hex()} is there")
        for tenant in living_keys_of_erased(connection):
            _unfinished(tenant, "a key that it had then was not destroyed")


def _refuse(position: int, why: str) -> NoReturn:
    raise Corrupt(f"I14 at position {position}: {why}", invariant="I14", position=position)


def _unfinished(tenant: str | None, why: str) -> NoReturn:
    whose = f"tenant {tenant}" if tenant is not None else "a tenant"
    again = f"tinkerbell tenants erase {tenant or 'TENANT'}"
    raise Corrupt(f"I16: {whose} was erased, and yet {why}; run `{again}` again", invariant="I16")
