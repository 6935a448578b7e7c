"""Rows of the log -> recorded events."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy import RowMapping

from tinkerbell.events.audited import AUDITED
from tinkerbell.events.codec import read_event
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.querying import unindexed
from tinkerbell.events.rules import record
from tinkerbell.events.state import Original
from tinkerbell.events.tables import event_blobs, events

T = TypeVar("T")
IN_LIMIT = 5000
"""Most values in one IN list: SQLite takes 32766 parameters, a planner is happier with fewer."""


_BODILESS = [sa.null().label("body") if column is events.c.body else column for column in events.c]


def in_parts(values: Iterable[T]) -> Iterator[list[T]]:
    """The values in lists short enough for IN."""
    rest = list(values)
    for start in range(0, len(rest), IN_LIMIT):
        yield rest[start : start + IN_LIMIT]


def page(
    connection: sa.Connection,
    after: int,
    limit: int,
    *,
    tenant: str | None = None,
    adapter: str | None = None,
    types: Collection[str] | None = None,
    bodies: bool = True,
) -> list[Recorded]:
    """Events with a position above `after`, by position, at most `limit`; `bodies`: with those that are inline."""
    query = sa.select(*(events.c if bodies else _BODILESS)).where(events.c.position > after)
    if tenant is not None:
        # An adapter has fewer events than its tenant.
        query = query.where((events.c.tenant if adapter is None else unindexed(events.c.tenant)) == tenant)
    if adapter is not None:
        query = query.where(events.c.adapter == adapter)
    if types is not None:
        query = query.where(events.c.type.in_(sorted(types)))
    rows = connection.execute(query.order_by(events.c.position).limit(limit)).mappings().all()
    return decode_rows(connection, rows)


def page_back(
    connection: sa.Connection, before: int | None, limit: int, *, adapter: str, types: Collection[str]
) -> list[Recorded]:
    """Events of an adapter with a position below `before`, newest first, at most `limit`."""
    query = sa.select(events).where(events.c.adapter == adapter, events.c.type.in_(sorted(types)))
    if before is not None:
        query = query.where(events.c.position < before)
    rows = connection.execute(query.order_by(events.c.position.desc()).limit(limit)).mappings().all()
    return decode_rows(connection, rows)


def original(connection: sa.Connection, tenant: str, idempotency_key: str) -> Original | None:
    """The event that has a tenant's idempotency key, with the hash of its request."""
    mine = (events.c.tenant == tenant) & (events.c.idempotency_key == idempotency_key)
    rows = connection.execute(sa.select(events).where(mine)).mappings().all()
    found = zip(rows, decode_rows(connection, rows), strict=True)
    return next((Original(row["request_hash"], recorded) for row, recorded in found), None)


def originals(connection: sa.Connection, tenant: str, idempotency_keys: Collection[str]) -> dict[str, Recorded]:
    """Key -> the event that has it among the tenant's."""
    found: dict[str, Recorded] = {}
    for part in in_parts(idempotency_keys):
        mine = (events.c.tenant == tenant) & events.c.idempotency_key.in_(part)
        rows = connection.execute(sa.select(events).where(mine)).mappings().all()
        for row, recorded in zip(rows, decode_rows(connection, rows), strict=True):
            found[row["idempotency_key"]] = recorded
    return found


def audited(
    connection: sa.Connection, tenant: str, types: Collection[str], span_us: tuple[int, int], limit: int
) -> list[Recorded]:
    """The tenant's events of AUDITED_TYPES, of these types, recorded in [begin, end), by time, at most `limit`."""
    c, (begin_us, end_us) = events.c, span_us
    query = sa.select(events).where(c.tenant == tenant, sa.text(AUDITED), c.type.in_(sorted(types)))
    query = query.where(c.created_us >= begin_us, c.created_us < end_us).order_by(c.created_us, c.position)
    return decode_rows(connection, connection.execute(query.limit(limit)).mappings().all())


def body_at(connection: sa.Connection, position: int) -> bytes | None:
    """The inline body of the event at a position, as stored."""
    stored: bytes | None = connection.execute(sa.select(events.c.body).where(events.c.position == position)).scalar()
    return stored


def at_positions(connection: sa.Connection, positions: Collection[int], *, bodies: bool = True) -> list[Recorded]:
    """The events at these positions, by position; `bodies`: with those that are inline."""
    found: list[Recorded] = []
    for part in in_parts(sorted(positions)):
        rows = connection.execute(
            sa.select(*(events.c if bodies else _BODILESS))
            .where(events.c.position.in_(part))
            .order_by(events.c.position)
        ).mappings()
        found += decode_rows(connection, rows.all())
    return found


def decode_rows(connection: sa.Connection, rows: Sequence[RowMapping]) -> list[Recorded]:
    """Recorded events of rows of `events`; what this release cannot read is there as `Unreadable`."""
    blobs = blobs_of(connection, rows)
    return [
        record(row, read_event(row["type"], row["schema_version"], row["data"]), blobs.get(row["position"], {}))
        for row in rows
    ]


def blobs_of(connection: sa.Connection, rows: Sequence[RowMapping]) -> dict[int, dict[str, bytes]]:
    """Position -> name -> hash of the blobs that these events name."""
    found: dict[int, dict[str, bytes]] = {}
    for part in in_parts(row["position"] for row in rows if row["num_blobs"]):
        for blob in connection.execute(sa.select(event_blobs).where(event_blobs.c.position.in_(part))):
            found.setdefault(blob.position, {})[blob.name] = blob.blob_hash
    return found
