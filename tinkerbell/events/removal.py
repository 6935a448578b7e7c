"""Bulk that leaves the log: whose bodies and blobs are gone and why, and the statements that take them out.

What an event says of itself stays, with every hash. An event of the log comes first and says what goes (tenant.erased,
bulk.compacted); taking it out afterwards can be repeated until it is done.
"""

import logging
import time
from collections.abc import Sequence

import msgspec
import sqlalchemy as sa

from tinkerbell.errors import Compacted, Erased, Gone
from tinkerbell.events.codec import canonical_json
from tinkerbell.events.reading import in_parts
from tinkerbell.events.tables import blobs, data_keys, erasures, event_blobs, events, removed_bulk
from tinkerbell.types import TenantId

log = logging.getLogger(__name__)

FILE, REMOVED = "file", "removed"
"""Where a blob is: in the blob directory, or nowhere any more."""

_ERASED = sa.exists().where(erasures.c.tenant == events.c.tenant, erasures.c.position > events.c.position)
_COMPACTED = sa.exists().where(removed_bulk.c.position == events.c.position)
STILL_THERE = sa.and_(~_ERASED, ~_COMPACTED)
"""Of an event: its bulk was not removed."""


class Bulk(msgspec.Struct, frozen=True, kw_only=True):
    """What a removal takes out."""

    num_bodies: int = 0
    """Inline ones; larger ones are among the blobs."""
    num_blobs: int = 0
    """Names of blobs: one that others name as well stays."""
    num_bytes: int = 0
    """As stored."""

    def __add__(self, other: "Bulk") -> "Bulk":
        return Bulk(
            num_bodies=self.num_bodies + other.num_bodies,
            num_blobs=self.num_blobs + other.num_blobs,
            num_bytes=self.num_bytes + other.num_bytes,
        )


def bulk_of(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> Bulk:
    """Bodies and blobs, not removed yet, of the events that this is true of."""
    mine = sa.and_(condition, ~_ERASED, ~_COMPACTED)
    length = sa.func.length(events.c.body)
    bodies, body_bytes = connection.execute(
        sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(length), 0)).where(mine, events.c.body.is_not(None))
    ).one()
    names, blob_bytes = connection.execute(
        sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(blobs.c.length), 0))
        .select_from(events.join(event_blobs, event_blobs.c.position == events.c.position))
        .join(blobs, blobs.c.hash == event_blobs.c.blob_hash)
        .where(mine)
    ).one()
    return Bulk(num_bodies=int(bodies), num_blobs=int(names), num_bytes=int(body_bytes) + int(blob_bytes))


def with_bulk(connection: sa.Connection, positions: Sequence[int]) -> list[int]:
    """Those of these events that have a body or blobs which were not removed yet."""
    named = sa.exists().where(event_blobs.c.position == events.c.position)
    query = sa.select(events.c.position).where(events.c.position.in_(positions), ~_ERASED, ~_COMPACTED)
    found = connection.execute(query.where(sa.or_(events.c.body.is_not(None), named)).order_by(events.c.position))
    return list(found.scalars())


def why_gone(connection: sa.Connection, position: int) -> Gone | None:
    """Why the bulk of the event at this position is not there any more; None: there is no reason."""
    found = connection.execute(
        sa.select(events.c.tenant, events.c.type, erasures.c.position, removed_bulk.c.removed_by)
        .select_from(events)
        .outerjoin(erasures, sa.and_(erasures.c.tenant == events.c.tenant, erasures.c.position > events.c.position))
        .outerjoin(removed_bulk, removed_bulk.c.position == events.c.position)
        .where(events.c.position == position)
    ).one_or_none()
    if found is None:
        return None
    tenant, type_, erased, compacted = found
    if erased is not None:
        return Erased(f"what event {position} held was erased with its tenant {tenant} (event {erased})")
    if compacted is not None and type_ == "checkpoint.written":
        return Compacted(
            f"the recovery point of event {position} was superseded or old, and removed (event {compacted})"
        )
    if compacted is not None:
        return Compacted(f"what event {position} held was removed by `tinkerbell db compact` (event {compacted})")
    return None


def why_blob_gone(connection: sa.Connection, digest: str) -> Gone | None:
    """The same for a blob by its hash (hex)."""
    named = sa.select(event_blobs.c.position).where(event_blobs.c.blob_hash == bytes.fromhex(digest))
    positions = connection.execute(named.order_by(event_blobs.c.position)).scalars().all()
    reasons = [why_gone(connection, position) for position in positions]
    return reasons[0] if reasons and all(reasons) else None


def _keys_of_erased(connection: sa.Connection) -> dict[TenantId, list[bytes]]:
    """Tenant -> ids of the data keys that its erasure says it destroys. No clock decides: it may have been moved."""
    said = sa.select(events.c.tenant, events.c.data).join(erasures, erasures.c.position == events.c.position)
    found = {}
    for tenant, data in connection.execute(said):
        text = data if isinstance(data, str) else canonical_json(data)
        try:
            found[tenant] = [bytes.fromhex(key) for key in msgspec.json.decode(text, type=_Said).data_keys]
        except ValueError as exc:
            # Other tenants' erasures go on; `tinkerbell audit verify` names the event.
            log.error("what was erased of tenant %s cannot be read: %s", tenant, exc)
    return found


class _Said(msgspec.Struct):
    """What is needed of a tenant.erased."""

    data_keys: list[str]


def _living(connection: sa.Connection, keys: Sequence[bytes]) -> list[bytes]:
    query = sa.select(data_keys.c.id).where(data_keys.c.id.in_(keys), data_keys.c.wrapped.is_not(None))
    return list(connection.execute(query).scalars())


def destroyed_keys(connection: sa.Connection) -> set[bytes]:
    """Ids of the data keys that erasures destroyed, all that there ever were."""
    said = sa.select(events.c.data).where(events.c.type == "tenant.erased")
    texts = (data if isinstance(data, str) else canonical_json(data) for data in connection.execute(said).scalars())
    return {bytes.fromhex(key) for text in texts for key in msgspec.json.decode(text, type=_Said).data_keys}


def living_keys_of_erased(connection: sa.Connection) -> list[TenantId]:
    """Tenants that were erased and whose keys of then are still there."""
    return [tenant for tenant, keys in _keys_of_erased(connection).items() if _living(connection, keys)]


def destroy_keys(connection: sa.Connection) -> int:
    """Destroy the data keys that erased tenants had when they were erased; how many there were."""
    living = [key for keys in _keys_of_erased(connection).values() for key in _living(connection, keys)]
    values = {"wrapped": None, "destroyed_us": time.time_ns() // 1000}
    for key in living:
        connection.execute(data_keys.update().where(data_keys.c.id == key).values(values))
    return len(living)


def drop_bodies(connection: sa.Connection) -> int:
    """Take out the inline bodies of all events that were erased or compacted; how many."""
    gone = sa.or_(_ERASED, _COMPACTED)
    return connection.execute(events.update().where(events.c.body.is_not(None), gone).values(body=None)).rowcount


def needed(connection: sa.Connection, hashes: Sequence[bytes]) -> set[bytes]:
    """Those of these blobs that an event names whose bulk is not gone."""
    found: set[bytes] = set()
    for part in in_parts(hashes):
        names = event_blobs.join(events, events.c.position == event_blobs.c.position)
        living = sa.select(event_blobs.c.blob_hash).select_from(names).where(STILL_THERE)
        found.update(connection.execute(living.where(event_blobs.c.blob_hash.in_(part)).distinct()).scalars())
    return found


def needed_of(connection: sa.Connection, first: bytes) -> dict[str, int]:
    """Hash (hex) -> bytes as stored, of all blobs whose hash begins with this byte and that an event needs."""
    names = event_blobs.join(events, events.c.position == event_blobs.c.position)
    query = (
        sa.select(blobs.c.hash, blobs.c.length)
        .select_from(names.join(blobs, blobs.c.hash == event_blobs.c.blob_hash))
        .where(event_blobs.c.blob_hash >= first, event_blobs.c.blob_hash <= first + b"\xff" * 31, STILL_THERE)
        .distinct()
    )
    return {digest.hex(): length for digest, length in connection.execute(query)}


def mark_removed(connection: sa.Connection, hashes: Sequence[bytes]) -> None:
    """These blobs are not needed any more, whether the table has them or not."""
    for part in in_parts(hashes):
        there = blobs.c.hash.in_(part), blobs.c.location == FILE
        connection.execute(blobs.update().where(*there).values(location=REMOVED))


def drop_blobs(connection: sa.Connection) -> int:
    """Mark the blobs as removed that no event needs any more; how many. Their files are still there."""
    needed = (
        sa.exists()
        .select_from(event_blobs.join(events, events.c.position == event_blobs.c.position))
        .where(event_blobs.c.blob_hash == blobs.c.hash, ~_ERASED, ~_COMPACTED)
    )
    done = connection.execute(blobs.update().where(blobs.c.location == FILE, ~needed).values(location=REMOVED))
    return done.rowcount


def removed_blobs(connection: sa.Connection) -> list[str]:
    """Hashes (hex) of the blobs that are marked as removed."""
    found = connection.execute(sa.select(blobs.c.hash).where(blobs.c.location == REMOVED)).scalars()
    return [digest.hex() for digest in found]
