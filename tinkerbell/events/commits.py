"""Who wrote the log: every transaction has a MAC over its events' hashes, under a key that follows from the key file.

Chains and seals show that nothing was changed later; this shows that nothing was written by somebody who has the
database and not the key file, such as a key.created of his own.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NoReturn

import msgspec
import sqlalchemy as sa

from tinkerbell.errors import Corrupt, KeyUnavailable
from tinkerbell.events.key_file import Keys
from tinkerbell.events.tables import commit_macs, events

PAGE = 10_000


def mac_of(keys: Keys, first: int, hashes: Sequence[bytes]) -> bytes:
    """[32] Of the events from position `first` on that have these hashes."""
    return keys.authenticate(b"tinkerbell commit 1" + first.to_bytes(8, "big") + b"".join(hashes))


class Commit(msgspec.Struct, frozen=True):
    """A transaction that was authenticated."""

    first: int
    """Position of its first event."""
    hashes: list[bytes]
    mac: bytes

    def is_of(self, keys: Keys) -> bool:
        """Whether it was written with this key file."""
        return mac_of(keys, self.first, self.hashes) == self.mac


def oldest(connection: sa.Connection) -> Commit | None:
    """The first transaction that was authenticated: it tells whose log this is, whatever somebody has put behind it."""
    row = connection.execute(sa.select(commit_macs).order_by(commit_macs.c.position).limit(1)).first()
    if row is None:
        return None
    query = sa.select(events.c.hash).where(events.c.position >= row.first, events.c.position <= row.position)
    return Commit(row.first, list(connection.execute(query.order_by(events.c.position)).scalars()), row.mac)


def check_commits(connection: sa.Connection, keys: Keys | None) -> int | None:
    """The first position from which on every event was written by who has the key file; None: none is, as in the log
    of an older release or of a server that has no key file.

    Raises Corrupt, and KeyUnavailable without the key file where there is something to be checked.
    """
    macs = connection.execute(sa.select(commit_macs).order_by(commit_macs.c.position)).all()
    if not macs:
        return None
    if keys is None:
        raise KeyUnavailable("the log is authenticated with a key file, and it is missing: say where it is")
    begun = position = int(macs[0].first)
    hashes = _hashes(connection, begun)
    for row in macs:
        if row.first != position or row.position < row.first:
            _refuse(position, "no MAC covers it: it was written by somebody without the key file")
        found = list(islice(hashes, row.position - row.first + 1))
        if mac_of(keys, row.first, found) != row.mac:
            _refuse(position, f"the MAC of events {row.first} to {row.position} is not that of this log's key file")
        position = row.position + 1
    if connection.execute(sa.select(events.c.position).where(events.c.position >= position).limit(1)).first():
        _refuse(position, "no MAC covers it: it was written by somebody without the key file")
    return begun


def _hashes(connection: sa.Connection, position: int) -> Iterator[bytes]:
    """Of the events from a position on."""
    while True:
        query = sa.select(events.c.position, events.c.hash).where(events.c.position >= position)
        rows = connection.execute(query.order_by(events.c.position).limit(PAGE)).all()
        if not rows:
            return
        yield from (row.hash for row in rows)
        position = rows[-1].position + 1


def _refuse(position: int, why: str) -> NoReturn:
    raise Corrupt(f"I18 at position {position}: {why}", invariant="I18", position=position)
