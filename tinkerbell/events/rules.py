"""What an event must satisfy to enter the log, decided over facts read in the append transaction.

No database here: `State` holds the facts, `admit` checks one event against them, moves them on, and gives its row.
A submit is checked on a fork of the state; the fork is merged when all its events were admitted (invariant I13).
"""

from typing import Any

import msgspec

from tinkerbell.errors import (
    AlreadyAnswered,
    Conflict,
    Fenced,
    Gone,
    IdempotencyConflict,
    NameTaken,
    NotFound,
    SequenceConflict,
    SessionOver,
)
from tinkerbell.events import kinds, quotas
from tinkerbell.events.chain import GENESIS, link
from tinkerbell.events.codec import Prepared
from tinkerbell.events.kinds import NewEvent, Recorded
from tinkerbell.events.names import Holder, living, name_of
from tinkerbell.events.projections import Cause, cause_of
from tinkerbell.events.quotas import Holding
from tinkerbell.events.state import AdapterFacts, CheckpointFacts, LeaseFacts, Original, SessionFacts, State, StreamHead


class Admitted(msgspec.Struct, frozen=True):
    """An event with its place in the log."""

    recorded: Recorded
    cause: Cause | None
    row: dict[str, Any]
    """Of the table `events`."""
    blobs: dict[str, bytes]
    """Name -> hash."""


def admit(
    state: State, prepared: Prepared, blobs: dict[str, bytes], num_bytes: int, now_us: int
) -> Admitted | Recorded:
    """The event's place in the log, or the earlier event that has its idempotency key. A refused event leaves the
    state as it is. `num_bytes`: as it is stored, with its blobs.

    Raises NotFound, SessionOver, Conflict, NameTaken, IdempotencyConflict, SequenceConflict, AlreadyAnswered, Fenced,
    Gone, TooManyRequests, QuotaExceeded.
    """
    new = prepared.new
    original = _original(state, new)
    if original is not None:
        return original
    _check_fence(state, new)
    _check_session(state, new)
    _check_shared(state, new)
    seq, cause, facts = None, None, None
    match new.event:
        case kinds.Request():
            seq, facts = _admit_request(state, new, new.event)
            _check_name(state, new, now_us)
        case kinds.Result():
            cause, facts = _admit_result(state, new, new.event)
        case kinds.LeaseGranted():
            _check_lease(state, new.event)
        case kinds.CheckpointCopied():
            facts = _admit_copy(state, new)
        case kinds.CheckpointChanged():
            _check_change(state, new, new.event, now_us)
        case _:
            pass
    holding = _hold(state, new, num_bytes, cause)
    admitted = _place(state, prepared, blobs, seq, cause, now_us)
    if new.adapter is not None and facts is not None:
        state.adapters[new.adapter] = facts
    if holding is not None:
        state.holdings[new.tenant] = holding
    if new.causation is not None and cause is not None:
        state.causes[new.causation] = msgspec.structs.replace(cause, answered=True)
    match new.event:
        case kinds.LeaseGranted() as event:
            state.leases[event.resource] = LeaseFacts(event.holder, event.epoch, 0)
        case kinds.SessionStarted() | kinds.SessionEnded() as event:
            state.sessions[event.session] = SessionFacts(new.tenant, isinstance(event, kinds.SessionEnded))
        case kinds.SaveRequested() as event if (name := name_of(event, new.adapter)) is not None:
            state.names[name] = state.names.get(name, {}) | {event.checkpoint: Holder(saved=False, expires_us=None)}
        case kinds.SaveCompleted() as event:
            gone = CheckpointFacts(new.tenant, deleted=True, expires_us=None)
            state.checkpoints.update(dict.fromkeys(event.replaces, gone))
        case kinds.CheckpointChanged() as event:
            state.checkpoints[event.checkpoint] = CheckpointFacts(new.tenant, event.deleted, event.expires_us)
        case _:
            pass
    return admitted


def _original(state: State, new: NewEvent) -> Recorded | None:
    if new.idempotency_key is None:
        return None
    original = state.originals.get((new.tenant, new.idempotency_key))
    if original is None:
        return None
    if original.request_hash != new.request_hash:
        raise IdempotencyConflict("this idempotency key was used for another request")
    return original.recorded


def _check_fence(state: State, new: NewEvent) -> None:
    if new.fence is None:
        return
    resource, epoch = new.fence
    lease = state.leases.get(resource)
    if lease is None or lease.epoch != epoch:
        raise Fenced(f"epoch {epoch} of the lease {resource} is over; it is at {lease.epoch if lease else 0}")


def _check_session(state: State, new: NewEvent) -> None:
    if new.session is None:
        return
    facts = state.sessions.get(new.session)
    if facts is None or facts.tenant != new.tenant:
        raise NotFound(f"There is no session {new.session!r}.")
    if facts.ended:
        raise SessionOver(f"The session {new.session!r} has ended; start another one.")


def _hold(state: State, new: NewEvent, num_bytes: int, cause: Cause | None) -> Holding | None:
    """What the tenant has with this event; None: nobody asks in this group."""
    holding = state.holdings.get(new.tenant)
    if holding is None:
        return None
    adapter = state.adapters.get(new.adapter or "")
    more = quotas.added(new, num_bytes, (adapter.num_parameters or 0) if adapter is not None else 0)
    if quotas.is_limited(new.event):
        quotas.check(holding.used, holding.limits, more)
    if cause is not None:
        more += quotas.answered(cause.reserved_tokens)
    return Holding(holding.used + more, holding.limits)


def _check_shared(state: State, new: NewEvent) -> None:
    for name, digest in new.shared.items():
        if bytes.fromhex(digest) not in state.blobs:
            raise Gone(f"the blob {digest} ({name}) was removed; it cannot be shared any more")


def _check_name(state: State, new: NewEvent, now_us: int) -> None:
    """A name has one checkpoint, from the moment that its save is asked for; another one may only replace it."""
    name = name_of(new.event, new.adapter)
    if name is None or not isinstance(new.event, kinds.SaveRequested):
        return
    if living(state.names.get(name, {}), now_us) - {new.event.checkpoint, *new.event.replaces}:
        raise NameTaken(
            f"There is a checkpoint {name.name!r} of this adapter already, or it is being saved; give another name, or"
            " overwrite it."
        )


def _check_change(state: State, new: NewEvent, event: kinds.CheckpointChanged, now_us: int) -> None:
    """What is gone stays gone, whoever read it before it went; to delete it again is fine."""
    facts = state.checkpoints.get(event.checkpoint)
    if facts is None or event.deleted:
        return
    expired = facts.expires_us is not None and facts.expires_us <= now_us
    if facts.tenant != new.tenant or facts.deleted or expired:
        raise NotFound(f"There is no checkpoint {event.checkpoint!r}.")


def _admit_copy(state: State, new: NewEvent) -> AdapterFacts:
    """What is known of the run that it makes: nothing is asked of it, ever."""
    if new.adapter is None:
        raise TypeError("a copy needs a run of its own")
    if new.adapter in state.adapters:
        raise Conflict("there is an adapter with this id already")
    return AdapterFacts(tenant=new.tenant, state="removed", next_seq=0, done_seq=-1)


def _admit_request(state: State, new: NewEvent, event: kinds.Request) -> tuple[int | None, AdapterFacts | None]:
    """The seq that it gets, and what is then known of its adapter."""
    kind = kinds.kind_of(event)
    if new.adapter is None:
        if kind not in kinds.SAMPLE_KINDS:
            raise TypeError(f"{kind} needs an adapter")
        return None, None
    facts = state.adapters.get(new.adapter)
    if isinstance(event, kinds.AddLoraRequested):
        if facts is not None:
            raise Conflict("there is an adapter with this id already")
        facts = AdapterFacts(new.tenant, "pending", 0, -1, event.num_parameters or None)
    elif facts is None or facts.tenant != new.tenant or facts.state in ("removed", "failed"):
        # One text for all three: nobody learns which ids others have.
        raise NotFound("there is no such adapter")
    if kind in kinds.SAMPLE_KINDS:
        return None, None
    if new.expected_seq is not None and new.expected_seq != facts.next_seq:
        raise SequenceConflict(
            f"seq {new.expected_seq} was given; the adapter's next one is {facts.next_seq}",
            next_seq=facts.next_seq,
        )
    return facts.next_seq, msgspec.structs.replace(facts, next_seq=facts.next_seq + 1)


def _admit_result(state: State, new: NewEvent, event: kinds.Result) -> tuple[Cause, AdapterFacts | None]:
    """The request that it answers, and what is then known of its adapter."""
    cause = state.causes.get(new.causation or 0)
    if (
        cause is None
        or new.causation is None
        or (cause.tenant, cause.adapter) != (new.tenant, new.adapter)
        or not kinds.answers(event, cause.kind)
    ):
        raise NotFound(f"there is no request {new.causation} that this answers")
    if cause.answered:
        raise AlreadyAnswered(f"request {new.causation} has its result")
    if cause.adapter is None:
        return cause, None
    facts = state.adapters[cause.adapter]
    if cause.seq is not None:
        due = facts.done_seq + 1
        if cause.seq != due:
            raise AlreadyAnswered(f"request {new.causation} has seq {cause.seq}; the next to be answered is {due}")
        facts = msgspec.structs.replace(facts, done_seq=cause.seq)
    match event:
        case kinds.AddLoraCompleted():
            facts = msgspec.structs.replace(facts, state="ready")
        case kinds.AddLoraFailed():
            facts = msgspec.structs.replace(facts, state="failed")
        case kinds.RemoveLoraCompleted():
            facts = msgspec.structs.replace(facts, state="removed")
        case _:
            pass
    return cause, facts


def _check_lease(state: State, event: kinds.LeaseGranted) -> None:
    lease = state.leases.get(event.resource)
    epoch = lease.epoch if lease else 0
    if event.epoch != epoch + 1:
        raise Fenced(f"the lease {event.resource} is at epoch {epoch}; {event.epoch} is not the next")


def _place(
    state: State,
    prepared: Prepared,
    blobs: dict[str, bytes],
    seq: int | None,
    cause: Cause | None,
    now_us: int,
) -> Admitted:
    new = prepared.new
    head = state.streams.get(new.stream) or StreamHead(-1, GENESIS)
    state.position += 1
    row: dict[str, Any] = {
        "position": state.position,
        "stream": new.stream,
        "stream_version": head.version + 1,
        "type": prepared.type,
        "schema_version": prepared.schema_version,
        "tenant": new.tenant,
        "adapter": new.adapter,
        "seq": seq,
        "causation": new.causation,
        "correlation": new.correlation,
        "actor": new.actor,
        "idempotency_key": new.idempotency_key,
        "request_hash": new.request_hash,
        "data": prepared.data,
        "body": prepared.body,
        "body_codec": prepared.body_codec,
        "body_hash": prepared.body_hash,
        "body_len": prepared.body_len,
        "num_blobs": len(blobs),
        "fence_resource": new.fence[0] if new.fence else None,
        "fence_epoch": new.fence[1] if new.fence else None,
        "created_us": now_us,
        "prev_hash": head.hash,
    }
    row["hash"] = link(head.hash, row, blobs)
    state.streams[new.stream] = StreamHead(head.version + 1, row["hash"])
    recorded = record(row, new.event, blobs)
    if isinstance(new.event, kinds.Request):
        state.causes[recorded.position] = cause_of(recorded)
    if new.idempotency_key is not None and new.request_hash is not None:
        state.originals[new.tenant, new.idempotency_key] = Original(new.request_hash, recorded)
    return Admitted(recorded, cause, row, blobs)


def record(row: Any, event: kinds.AnyRead, blobs: dict[str, bytes]) -> Recorded:
    """The envelope of a row of `events` (a mapping of its columns)."""
    return Recorded(
        position=row["position"],
        stream=row["stream"],
        stream_version=row["stream_version"],
        at_us=row["created_us"],
        tenant=row["tenant"],
        adapter=row["adapter"],
        seq=row["seq"],
        event=event,
        body=row["body"],
        blobs={name: digest.hex() for name, digest in sorted(blobs.items())},
        causation=row["causation"],
        correlation=row["correlation"],
        actor=row["actor"],
        hash=row["hash"].hex(),
        body_codec=row["body_codec"],
        body_hash=row["body_hash"].hex() if row["body_hash"] is not None else None,
    )
