"""Reads what admission needs to know, for a whole group of submits in a few queries."""

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from tinkerbell.errors import Corrupt
from tinkerbell.events.codec import Prepared
from tinkerbell.events.leases import stream_of
from tinkerbell.events.projections import Cause
from tinkerbell.events.reading import decode_rows, in_parts
from tinkerbell.events.rules import AdapterFacts, LeaseFacts, Original, State, StreamHead
from tinkerbell.events.tables import adapters, events, futures, leases, log_head, streams


def _lookup(key: sa.Column[Any], *columns: sa.Column[Any]) -> sa.Select[*tuple[Any, ...]]:
    """Rows whose `key` is among the bound values `keys`."""
    return sa.select(*columns).where(key.in_(sa.bindparam("keys", expanding=True)))


# Building a statement costs more than running it, so each is built once.
_HEAD = sa.select(log_head.c.position)
_LOCKED_HEAD = _HEAD.with_for_update()
_STREAMS = _lookup(streams.c.stream, streams.c.stream, streams.c.version, streams.c.head_hash)
_ORIGINALS = _lookup(events.c.idempotency_key, *events.c)
_ADAPTERS = _lookup(
    adapters.c.id, adapters.c.id, adapters.c.tenant, adapters.c.state, adapters.c.next_seq, adapters.c.done_seq
)
_CAUSES = _lookup(
    futures.c.id,
    futures.c.id,
    futures.c.tenant,
    futures.c.adapter,
    futures.c.seq,
    futures.c.kind,
    futures.c.num_tokens,
    futures.c.state,
)
_LEASES = _lookup(leases.c.resource, leases.c.resource, leases.c.holder, leases.c.epoch, leases.c.expires_us)


def lock_head(connection: sa.Connection) -> int:
    """The last position, locked until the transaction ends: positions are given out in commit order."""
    query = _HEAD if connection.dialect.name == "sqlite" else _LOCKED_HEAD
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
    return {
        row.stream: StreamHead(row.version, row.head_hash)
        for part in in_parts(names)
        for row in connection.execute(_STREAMS, {"keys": part})
    }


def _originals(connection: sa.Connection, keys: set[str]) -> dict[tuple[str, str], Original]:
    found: dict[tuple[str, str], Original] = {}
    for part in in_parts(keys):
        rows = connection.execute(_ORIGINALS, {"keys": part}).mappings().all()
        for row, recorded in zip(rows, decode_rows(connection, rows), strict=True):
            found[row["tenant"], row["idempotency_key"]] = Original(row["request_hash"], recorded)
    return found


def _adapters(connection: sa.Connection, ids: set[str]) -> dict[str, AdapterFacts]:
    return {
        row.id: AdapterFacts(row.tenant, row.state, row.next_seq, row.done_seq)
        for part in in_parts(ids)
        for row in connection.execute(_ADAPTERS, {"keys": part})
    }


def _causes(connection: sa.Connection, ids: set[int]) -> dict[int, Cause]:
    return {
        row.id: Cause(row.tenant, row.adapter, row.seq, row.kind, row.num_tokens, row.state != "pending")
        for part in in_parts(ids)
        for row in connection.execute(_CAUSES, {"keys": part})
    }


def _leases(connection: sa.Connection, resources: set[str]) -> dict[str, LeaseFacts]:
    return {
        row.resource: LeaseFacts(row.holder, row.epoch, row.expires_us)
        for part in in_parts(resources)
        for row in connection.execute(_LEASES, {"keys": part})
    }
