"""Reads what admission needs to know, for a whole group of submits in a few queries."""

from collections.abc import Collection, Sequence

import sqlalchemy as sa

from tinkerbell.config import Limits
from tinkerbell.errors import Corrupt
from tinkerbell.events import holdings
from tinkerbell.events.codec import Prepared
from tinkerbell.events.kinds import CheckpointChanged, NewEvent
from tinkerbell.events.leases import stream_of
from tinkerbell.events.name_holders import holders
from tinkerbell.events.names import name_of
from tinkerbell.events.projections import Cause
from tinkerbell.events.reading import at_positions
from tinkerbell.events.removal import FILE
from tinkerbell.events.state import AdapterFacts, CheckpointFacts, LeaseFacts, Original, SessionFacts, State, StreamHead
from tinkerbell.events.statements import Lookup, Statements
from tinkerbell.events.tables import adapters, blobs, checkpoints, events, futures, leases, log_head, sessions, streams

_HEAD = sa.select(log_head.c.position)
_LOCKED_HEAD = _HEAD.with_for_update()
_STREAMS = Lookup([streams.c.stream], [streams.c.stream, streams.c.version, streams.c.head_hash])
_ORIGINALS = Lookup(
    [events.c.tenant, events.c.idempotency_key],
    [events.c.position, events.c.tenant, events.c.idempotency_key, events.c.request_hash],
)
_ADAPTERS = Lookup(
    [adapters.c.id],
    [
        adapters.c.id,
        adapters.c.tenant,
        adapters.c.state,
        adapters.c.next_seq,
        adapters.c.done_seq,
        adapters.c.num_parameters,
    ],
)
_CHECKPOINTS = Lookup(
    [checkpoints.c.id], [checkpoints.c.id, checkpoints.c.tenant, checkpoints.c.deleted, checkpoints.c.expires_us]
)
_SESSIONS = Lookup([sessions.c.id], [sessions.c.id, sessions.c.tenant, sessions.c.ended_us])
_CAUSES = Lookup(
    [futures.c.id],
    [
        futures.c.id,
        futures.c.tenant,
        futures.c.adapter,
        futures.c.seq,
        futures.c.kind,
        futures.c.num_tokens,
        futures.c.state,
        futures.c.reserved_tokens,
    ],
)
_LEASES = Lookup([leases.c.resource], [leases.c.resource, leases.c.holder, leases.c.epoch, leases.c.expires_us])


def lock_head(statements: Statements) -> int:
    """The last position, locked until the transaction ends: positions are given out in commit order."""
    position = statements.scalar(_HEAD if statements.database == "sqlite" else _LOCKED_HEAD)
    if position is None:
        raise Corrupt("the table log_head is empty")
    return int(position)


def read_state(
    connection: sa.Connection,
    statements: Statements,
    position: int,
    prepared: Sequence[Prepared],
    resources: Collection[str],
    limits: Limits,
) -> State:
    """The facts for these events and for claims of these leases, as of `position`. `limits`: of tenants that have none
    of their own."""
    news = [item.new for item in prepared]
    causes = _causes(statements, {new.causation for new in news if new.causation is not None})
    named = {new.adapter for new in news if new.adapter is not None}
    named |= {cause.adapter for cause in causes.values() if cause.adapter is not None}
    wanted = {new.fence[0] for new in news if new.fence is not None} | set(resources)
    return State(
        position,
        _streams(statements, {new.stream for new in news} | {stream_of(resource) for resource in resources}),
        _originals(connection, statements, [new for new in news if new.idempotency_key is not None]),
        _adapters(statements, named),
        causes,
        _leases(statements, wanted),
        _sessions(statements, {new.session for new in news if new.session is not None}),
        holders(connection, {name for new in news if (name := name_of(new.event, new.adapter)) is not None}),
        _checkpoints(statements, {new.event.checkpoint for new in news if isinstance(new.event, CheckpointChanged)}),
        _blobs(connection, {bytes.fromhex(digest) for new in news for digest in new.shared.values()}),
        holdings.read(connection, statements, ((new.tenant, new.event) for new in news), limits),
    )


def _streams(statements: Statements, names: set[str]) -> dict[str, StreamHead]:
    return {name: StreamHead(version, hash_) for name, version, hash_ in statements.look_up(_STREAMS, names)}


def _originals(
    connection: sa.Connection, statements: Statements, news: Sequence[NewEvent]
) -> dict[tuple[str, str], Original]:
    rows = statements.look_up(_ORIGINALS, {(new.tenant, new.idempotency_key) for new in news})
    recorded = {event.position: event for event in at_positions(connection, [row[0] for row in rows])}
    return {(tenant, key): Original(hash_, recorded[position]) for position, tenant, key, hash_ in rows}


def _adapters(statements: Statements, ids: set[str]) -> dict[str, AdapterFacts]:
    return {row[0]: AdapterFacts(*row[1:]) for row in statements.look_up(_ADAPTERS, ids)}


def _causes(statements: Statements, ids: set[int]) -> dict[int, Cause]:
    rows = statements.look_up(_CAUSES, ids)
    return {
        id_: Cause(tenant, adapter, seq, kind, num_tokens, state != "pending", reserved)
        for id_, tenant, adapter, seq, kind, num_tokens, state, reserved in rows
    }


def _leases(statements: Statements, resources: set[str]) -> dict[str, LeaseFacts]:
    return {row[0]: LeaseFacts(*row[1:]) for row in statements.look_up(_LEASES, resources)}


def _sessions(statements: Statements, ids: set[str]) -> dict[str, SessionFacts]:
    rows = statements.look_up(_SESSIONS, ids)
    return {id_: SessionFacts(tenant, ended_us is not None) for id_, tenant, ended_us in rows}


def _checkpoints(statements: Statements, ids: set[str]) -> dict[str, CheckpointFacts]:
    return {
        id_: CheckpointFacts(tenant, bool(deleted), expires_us)
        for id_, tenant, deleted, expires_us in statements.look_up(_CHECKPOINTS, ids)
    }


def _blobs(connection: sa.Connection, hashes: set[bytes]) -> dict[bytes, int]:
    if not hashes:
        return {}
    there = sa.select(blobs.c.hash, blobs.c.length).where(blobs.c.hash.in_(hashes), blobs.c.location == FILE)
    return {row.hash: row.length for row in connection.execute(there)}
