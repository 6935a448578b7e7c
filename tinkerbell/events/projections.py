"""Pure folds: what one event changes in the projections. No database, no clock: replaying the log gives the tables.

`fold` gives changes; `projector.py` applies them with SQL in the append transaction, `apply` to plain dicts.
"""

from typing import Any

import msgspec

from tinkerbell.events import kinds, quotas
from tinkerbell.events.codec import canonical_json
from tinkerbell.events.kinds import Recorded
from tinkerbell.types import LoraConfig, session_of

Key = tuple[Any, ...]
Row = dict[str, Any]
Tables = dict[str, dict[Key, Row]]
"""Table -> key -> the other columns."""

KEYS: dict[str, tuple[str, ...]] = {
    "futures": ("id",),
    "adapters": ("id",),
    "checkpoints": ("id",),
    "sessions": ("id",),
    "samplers": ("id",),
    "usage": ("hour_us", "tenant", "adapter", "kind"),
    "leases": ("resource",),
    "tenants": ("tenant",),
    "api_keys": ("key_id",),
    "environments": ("position",),
    "batches": ("id",),
    "erasures": ("tenant",),
    "removed_bulk": ("position",),
    "totals": ("tenant", "adapter", "kind"),
    "bills": ("tenant",),
    "lines": ("tenant",),
}
"""Primary key of each projection."""

HOUR_US = 3_600_000_000

_USED = ("tokens_in", "tokens_out", "cost_us")
_TOTALS = ("num_accepted", "num_failed", "tokens_accepted", "num_answered", *_USED)


class Put(msgspec.Struct, frozen=True):
    """The row with this key is now this one."""

    table: str
    key: Key
    values: Row


class Set(msgspec.Struct, frozen=True):
    """These columns of the row change; nothing happens where there is no such row."""

    table: str
    key: Key
    values: Row


class Add(msgspec.Struct, frozen=True):
    """These numbers are added to the row, which starts from zero."""

    table: str
    key: Key
    values: Row


Change = Put | Set | Add


class Cause(msgspec.Struct, frozen=True):
    """What a fold needs to know of the request that a result answers."""

    tenant: str
    adapter: str | None
    seq: int | None
    kind: str
    num_tokens: int
    answered: bool = False
    reserved_tokens: int = 0
    """What it may come to; see quotas."""


def num_tokens_of(event: kinds.Event) -> int:
    """Tokens a request brings with it."""
    match event:
        case kinds.ForwardRequested() | kinds.ForwardBackwardRequested() | kinds.SampleRequested() | kinds.Unreadable():
            return event.num_tokens
        case _:
            return 0


def cause_of(recorded: Recorded) -> Cause:
    """The request of this event as its result will see it."""
    assert kinds.is_request(recorded.event)
    kind, tokens = kinds.kind_of(recorded.event), num_tokens_of(recorded.event)
    reserved = quotas.reserved_tokens(recorded.event)
    return Cause(recorded.tenant, recorded.adapter, recorded.seq, kind, tokens, reserved_tokens=reserved)


def fold(recorded: Recorded, cause: Cause | None) -> list[Change]:
    """What this event changes. `cause`: the request a result answers, None for every other event. Of one that cannot be
    read: what its row says."""
    event = recorded.event
    if isinstance(event, kinds.Unreadable):
        return _request(recorded, event) if kinds.is_request(event) else []
    match event:
        case kinds.Request():
            return _request(recorded, event)
        case kinds.Result():
            assert cause is not None
            return _result(recorded, event, cause)
        case kinds.BatchPlanned():
            return [Put("batches", (event.batch,), _planned(recorded, event))]
        case kinds.BatchRan():
            done = {"state": "ran", "busy_us": event.busy_us, "done_us": recorded.at_us}
            return [Set("batches", (event.batch,), done)]
        case kinds.BatchLost():
            return [Set("batches", (event.batch,), {"state": "lost", "done_us": recorded.at_us})]
        case kinds.CheckpointWritten():
            return [_checkpoint(recorded, event, kind="recovery", name=None, after_seq=event.after_seq)]
        case kinds.CheckpointChanged():
            kept: Row = {"expires_us": event.expires_us, "published": event.published, "deleted": event.deleted}
            return [Set("checkpoints", (event.checkpoint,), kept)]
        case kinds.CheckpointCopied():
            return [
                Put("adapters", (recorded.adapter,), _copied_run(recorded, event)),
                _checkpoint(recorded, event, kind="save", name=event.name, after_seq=-1),
            ]
        case kinds.SessionStarted():
            values: Row = {
                "tenant": recorded.tenant,
                "client": event.client,
                "display_name": event.display_name,
                "tags": _json_or_none(event.tags),
                "user_metadata": _json_or_none(event.user_metadata),
                "created_us": recorded.at_us,
                "heard_us": recorded.at_us,
                "ended_us": None,
            }
            return [Put("sessions", (event.session,), values)]
        case kinds.SessionHeard():
            return [Set("sessions", (event.session,), {"heard_us": recorded.at_us})]
        case kinds.SessionEnded():
            return [Set("sessions", (event.session,), {"ended_us": recorded.at_us})]
        case kinds.SamplerCreated():
            values = {
                "tenant": recorded.tenant,
                "session": event.session,
                "checkpoint": event.checkpoint,
                "created_us": recorded.at_us,
            }
            return [Put("samplers", (event.sampler,), values)]
        case kinds.EnvironmentRecorded():
            values = {
                "digest": event.digest,
                "executor": event.executor,
                "model": event.model.name,
                "exact": event.exact,
                "created_us": recorded.at_us,
            }
            return [Put("environments", (recorded.position,), values)]
        case kinds.LeaseGranted():
            return [Put("leases", (event.resource,), {"holder": event.holder, "epoch": event.epoch})]
        case kinds.KeyCreated():
            values = {
                "tenant": recorded.tenant,
                "key_hash": event.key_hash,
                "admin": event.admin,
                "note": event.note,
                "created_us": recorded.at_us,
                "revoked_us": None,
            }
            return [Put("api_keys", (event.key_id,), values)]
        case kinds.KeyRevoked():
            return [Set("api_keys", (event.key_id,), {"revoked_us": recorded.at_us})]
        case kinds.TenantConfigured():
            return [Put("tenants", (recorded.tenant,), msgspec.structs.asdict(event))]
        case kinds.SampleCancelled() | kinds.SamplerJoined() | kinds.LogSealed():
            return []
        case kinds.TenantErased():
            changes: list[Change] = [Put("erasures", (recorded.tenant,), {"position": recorded.position})]
            return changes + [Set("adapters", (adapter,), {"state": "removed"}) for adapter in event.adapters]
        case kinds.BulkCompacted():
            gone: list[Change] = [
                Put("removed_bulk", (position,), {"removed_by": recorded.position}) for position in event.positions
            ]
            return gone + [Set("checkpoints", (point,), {"deleted": True}) for point in event.checkpoints]
        case _:
            raise TypeError(f"no fold for {type(event).__name__}")


def _json_or_none(value: Any) -> str | None:
    """Nothing for what is empty."""
    return canonical_json(value) if value else None


def apply(tables: Tables, change: Change) -> None:
    """Make one change to projections held in memory."""
    table = tables.setdefault(change.table, {})
    match change:
        case Put():
            table[change.key] = dict(change.values)
        case Set():
            if change.key in table:
                table[change.key].update(change.values)
        case Add():
            row = table.setdefault(change.key, {})
            for column, value in change.values.items():
                row[column] = row.get(column, 0) + value


def _request(recorded: Recorded, event: kinds.Event) -> list[Change]:
    reserved = quotas.reserved_tokens(event)
    values: Row = {
        "tenant": recorded.tenant,
        "adapter": recorded.adapter,
        "seq": recorded.seq,
        "kind": kinds.kind_of(event),
        "state": "pending",
        "num_tokens": num_tokens_of(event),
        "tokens_out": 0,
        "reserved_tokens": reserved,
        "result_position": None,
        "cost_us": None,
        "created_us": recorded.at_us,
        "done_us": None,
    }
    line = {"num_requests": 1, "num_tokens": reserved}
    changes: list[Change] = [
        Put("futures", (recorded.position,), values),
        Add("lines", (recorded.tenant,), line),
        _totals(cause_of(recorded), num_accepted=1, tokens_accepted=num_tokens_of(event)),
    ]
    if isinstance(event, kinds.AddLoraRequested):
        changes.append(Put("adapters", (recorded.adapter,), _adapter(recorded, event)))
    elif recorded.seq is not None:
        changes.append(Set("adapters", (recorded.adapter,), {"next_seq": recorded.seq + 1}))
    return changes


def _totals(cause: Cause, **more: int) -> Add:
    return Add("totals", (cause.tenant, cause.adapter or "", cause.kind), dict.fromkeys(_TOTALS, 0) | more)


def _adapter(recorded: Recorded, event: kinds.AddLoraRequested) -> Row:
    return {
        "tenant": recorded.tenant,
        "session": session_of(recorded.adapter),
        "name": event.name,
        "base_model": event.base_model,
        "base_hash": event.base_hash or None,
        "lora": canonical_json(event.lora),
        "seed": event.seed,
        "checkpoint": event.checkpoint,
        "with_optimizer": event.with_optimizer,
        "user_metadata": _json_or_none(event.user_metadata),
        "state": "pending",
        "num_parameters": event.num_parameters or None,
        "step": 0,
        "next_seq": 1,
        "done_seq": -1,
        "last_loss": None,
        "state_digest": None,
        "created_us": recorded.at_us,
    }


def _copied_run(recorded: Recorded, event: kinds.CheckpointCopied) -> Row:
    """It was never in memory, and is as one that has left it."""
    return {
        "tenant": recorded.tenant,
        "session": session_of(recorded.adapter),
        "name": None,
        "base_model": event.base_model,
        "base_hash": event.base_hash or None,
        "lora": canonical_json(event.lora),
        "seed": event.seed,
        "checkpoint": event.source,
        "with_optimizer": "optimizer" in recorded.blobs,
        "user_metadata": None,
        "state": "removed",
        "num_parameters": None,
        "step": event.step,
        "next_seq": 0,
        "done_seq": -1,
        "last_loss": None,
        "state_digest": event.state_digest,
        "created_us": recorded.at_us,
    }


def _result(recorded: Recorded, event: kinds.Result, cause: Cause) -> list[Change]:
    failed = isinstance(event, kinds.Failed)
    tokens_out = event.num_sampled_tokens if isinstance(event, kinds.SampleCompleted) else 0
    answered = {
        "state": "failed" if failed else "completed",
        "tokens_out": tokens_out,
        "reserved_tokens": 0,
        "result_position": recorded.position,
        "cost_us": event.cost_us,
        "done_us": recorded.at_us,
    }
    hour = recorded.at_us - recorded.at_us % HOUR_US
    used = {
        "num_requests": 1,
        "tokens_in": 0 if failed else cause.num_tokens,
        "tokens_out": tokens_out,
        "cost_us": event.cost_us,
    }
    assert recorded.causation is not None
    changes: list[Change] = [
        Set("futures", (recorded.causation,), answered),
        Add("usage", (hour, cause.tenant, cause.adapter or "", cause.kind), used),
        _totals(cause, num_failed=int(failed), num_answered=1, **{name: used[name] for name in _USED}),
        Add("bills", (cause.tenant,), {"cost_us": event.cost_us}),
        Add("lines", (cause.tenant,), {"num_requests": -1, "num_tokens": -cause.reserved_tokens}),
    ]
    effect = _effect(event)
    if cause.seq is not None:
        effect["done_seq"] = cause.seq
    if cause.adapter is not None and effect:
        changes.append(Set("adapters", (cause.adapter,), effect))
    if isinstance(event, kinds.SaveCompleted):
        assert cause.seq is not None
        changes.append(_checkpoint(recorded, event, kind="save", name=event.name, after_seq=cause.seq))
        changes += [Set("checkpoints", (replaced,), {"deleted": True}) for replaced in event.replaces]
    return changes


def _effect(event: kinds.Result) -> Row:
    """Columns of its adapter that a result changes."""
    match event:
        case kinds.AddLoraCompleted():
            return {
                "state": "ready",
                "num_parameters": event.num_parameters,
                "step": event.step,
                "state_digest": event.state_digest,
            }
        case kinds.AddLoraFailed():
            return {"state": "failed"}
        case kinds.RemoveLoraCompleted():
            return {"state": "removed"}
        case kinds.ForwardBackwardCompleted():
            return {"last_loss": event.loss / event.num_tokens} if event.num_tokens else {}
        case kinds.OptimStepCompleted() | kinds.LoadCompleted():
            return {"step": event.step, "state_digest": event.state_digest}
        case _:
            return {}


def _checkpoint(
    recorded: Recorded,
    event: kinds.AnyCheckpoint,
    *,
    kind: str,
    name: str | None,
    after_seq: int,
) -> Put:
    lora: LoraConfig = event.lora
    saved = None if isinstance(event, kinds.CheckpointWritten) else event
    ttl_s = saved.ttl_s if saved else None
    values = {
        "tenant": recorded.tenant,
        "adapter": recorded.adapter,
        "kind": kind,
        "name": name,
        "after_seq": after_seq,
        "step": event.step,
        "lora": canonical_json(lora),
        "num_bytes": event.num_bytes,
        "state_digest": event.state_digest,
        "blobs": canonical_json(recorded.blobs),
        "position": recorded.position,
        "created_us": recorded.at_us,
        "use": saved.use if saved else "state",
        "user_metadata": _json_or_none(saved.user_metadata if saved else {}),
        "expires_us": None if ttl_s is None else recorded.at_us + ttl_s * 1_000_000,
        "published": False,
        "deleted": False,
    }
    return Put("checkpoints", (event.checkpoint,), values)


def _planned(recorded: Recorded, event: kinds.BatchPlanned) -> Row:
    return {
        "lane": event.lane,
        "environment": event.environment,
        "state": "planned",
        "num_units": len(event.units),
        "num_requests": len({unit.request for unit in event.units}),
        "estimated_us": event.estimated_us,
        "busy_us": None,
        "planned_us": recorded.at_us,
        "done_us": None,
        "position": recorded.position,
    }
