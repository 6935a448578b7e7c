"""Reads what admission needs to know, for a whole group of submits in a few queries."""

from collections.abc import Collection, Sequence

import sqlalchemy as sa

from tinkerbell.errors import Corrupt
from tinkerbell.events.codec import Prepared
from tinkerbell.events.leases import stream_of
from tinkerbell.events.projections import Cause
from tinkerbell.events.reading import decode_rows, in_parts
from tinkerbell.events.rules import AdapterFacts, LeaseFacts, Original, State, StreamHead
from tinkerbell.events.tables import adapters, events, futures, leases, log_head, streams


def lock_head(connection: sa.Connection) -> int:
    """The last position, locked until the transaction ends: positions are given out in commit order."""
    query = sa.select(log_head.c.position)
    if connection.dialect.name != "sqlite":
        query = query.with_for_update()
    position = connection.execute(query).scalar_one_or_none()
    if position is None:
        raise Corrupt("the table log_head is empty")
    return int(position)


def read_state(
    connection: sa.Connection, position: int, prepared: Sequence[Prepared], resources: Collection[str]
) -> State:
    """The facts for these events and for claims of these leases, as of `position`."""
    news = [item.new for item in prepared]
    causes = _causes(connection, {new.causation for new in news if new.causation is not None})
    named = {new.adapter for new in news if new.adapter is not None}
    named |= {cause.adapter for cause in causes.values() if cause.adapter is not None}
    wanted = {new.fence[0] for new in news if new.fence is not None} | set(resources)
    return State(
        position,
        _streams(connection, {new.stream for new in news} | {stream_of(resource) for resource in resources}),
        _originals(connection, {new.idempotency_key for new in news if new.idempotency_key is not None}),
        _adapters(connection, named),
        causes,
        _leases(connection, wanted),
    )


def _streams(connection: sa.Connection, names: set[str]) -> dict[str, StreamHead]:
    query = sa.select(streams.c.stream, streams.c.version, streams.c.head_hash)
    return {
        row.stream: StreamHead(row.version, row.head_hash)
        for part in in_parts(names)
        for row in connection.execute(query.where(streams.c.stream.in_(part)))
    }


def _originals(connection: sa.Connection, keys: set[str]) -> dict[tuple[str, str], Original]:
    found: dict[tuple[str, str], Original] = {}
    for part in in_parts(keys):
        rows = connection.execute(sa.select(events).where(events.c.idempotency_key.in_(part))).mappings().all()
        for row, recorded in zip(rows, decode_rows(connection, rows), strict=True):
            found[row["tenant"], row["idempotency_key"]] = Original(row["request_hash"], recorded)
    return found


def _adapters(connection: sa.Connection, ids: set[str]) -> dict[str, AdapterFacts]:
    columns = adapters.c
    query = sa.select(columns.id, columns.tenant, columns.state, columns.next_seq, columns.done_seq)
    return {
        row.id: AdapterFacts(row.tenant, row.state, row.next_seq, row.done_seq)
        for part in in_parts(ids)
        for row in connection.execute(query.where(columns.id.in_(part)))
    }


def _causes(connection: sa.Connection, ids: set[int]) -> dict[int, Cause]:
    columns = futures.c
    query = sa.select(
        columns.id,
        columns.tenant,
        columns.adapter,
        columns.seq,
        columns.kind,
        columns.num_tokens,
        columns.state,
    )
    return {
        row.id: Cause(row.tenant, row.adapter, row.seq, row.kind, row.num_tokens, row.state != "pending")
        for part in in_parts(ids)
        for row in connection.execute(query.where(columns.id.in_(part)))
    }


def _leases(connection: sa.Connection, resources: set[str]) -> dict[str, LeaseFacts]:
    return {
        row.resource: LeaseFacts(row.holder, row.epoch, row.expires_us)
        for part in in_parts(resources)
        for row in connection.execute(sa.select(leases).where(leases.c.resource.in_(part)))
    }
