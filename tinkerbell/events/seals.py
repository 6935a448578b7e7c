"""Seals: one hash that stands for the whole log up to a position, to be kept where nobody who can write the log can.

A hash chain alone does not show that a whole stream was written anew, hashes and all. The root of the Merkle tree over
every stream's head does, to whoever has kept an older root.

The tree is that of RFC 6962 section 2.1 (Certificate Transparency): a leaf is sha256(0x00 || entry), a node
sha256(0x01 || left || right), the left side of n leaves has the largest power of two smaller than n, and no leaves at
all are sha256 of nothing. Leaves and nodes begin with different bytes, so that none can stand for the other. An entry
is the MessagePack array (stream, version, head hash [32]); entries are ordered by the name of the stream.
"""

import hashlib
from collections.abc import Mapping, Sequence

import msgspec
import sqlalchemy as sa

from tinkerbell.events.kinds import LogSealed, Recorded
from tinkerbell.events.reading import at_positions
from tinkerbell.events.tables import events, log_head, streams

STREAM = "system/log"
"""Has the seals, and nothing else."""

Heads = Mapping[str, tuple[int, bytes]]
"""Stream -> version and hash of its last event."""

_encode = msgspec.msgpack.Encoder().encode


def root_of(heads: Heads) -> bytes:
    """The Merkle root [32] over these heads."""
    entries = sorted((name.encode(), _encode((name, version, digest))) for name, (version, digest) in heads.items())
    return merkle_root([entry for _, entry in entries])


def merkle_root(entries: Sequence[bytes]) -> bytes:
    """The tree hash of RFC 6962 section 2.1 over a list of byte strings."""
    if not entries:
        return hashlib.sha256(b"").digest()
    level = [hashlib.sha256(b"\0" + entry).digest() for entry in entries]
    # Pairs from the left, an odd one taken up as it is, give the same tree as splitting at powers of two.
    while len(level) > 1:
        pairs = [
            hashlib.sha256(b"\1" + level[at] + level[at + 1]).digest() if at + 1 < len(level) else level[at]
            for at in range(0, len(level), 2)
        ]
        level = pairs
    return level[0]


def seal(connection: sa.Connection) -> LogSealed | None:
    """The seal of the log as this snapshot sees it; None when nothing has happened since the last one."""
    position = int(connection.execute(sa.select(log_head.c.position)).scalar_one())
    last = newest(connection)
    if position == (last.position if last is not None else 0):
        return None
    rows = connection.execute(sa.select(streams.c.stream, streams.c.version, streams.c.head_hash))
    heads = {row.stream: (row.version, row.head_hash) for row in rows}
    return LogSealed(position=position, root=root_of(heads).hex(), num_streams=len(heads))


def newest(connection: sa.Connection) -> Recorded | None:
    """The newest log.sealed."""
    query = sa.select(events.c.position).where(events.c.stream == STREAM).order_by(events.c.stream_version.desc())
    return next(iter(at_positions(connection, connection.execute(query.limit(1)).scalars().all())), None)


def last_sealed_us(connection: sa.Connection) -> int | None:
    """When the log was last sealed; or else when it began; None for an empty log."""
    found = newest(connection) or next(iter(at_positions(connection, [1])), None)
    return None if found is None else found.at_us
