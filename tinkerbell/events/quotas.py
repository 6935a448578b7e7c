"""What a tenant may have: how much of it each event takes, and what is said where that is too much. Pure.

`used` comes from `holdings`, in the transaction that appends: neither concurrent requests nor other processes get past
a limit. A limit holds for what a tenant makes. What answers it, what ends or frees something, and what the server does
of its own accord, is never refused: see FREE.
"""

from collections.abc import Collection

import msgspec

from tinkerbell.config import Limits
from tinkerbell.errors import QuotaExceeded, TooManyRequests
from tinkerbell.events import kinds
from tinkerbell.events.kinds import NewEvent
from tinkerbell.types import is_sampler

BYTES_PER_PARAMETER = 16
"""Of an adapter in an executor: weight, gradient and both Adam moments, fp32."""
RETRY_S = 1.0
"""Advice where something drains by itself."""


class Amounts(msgspec.Struct, frozen=True, kw_only=True):
    """So much of everything that is limited: what a tenant has, what it may have, or what an event adds."""

    pending_requests: int = 0
    """Accepted and not answered."""
    pending_tokens: int = 0
    """That those bring, and those that may be sampled for them."""
    adapters: int = 0
    """Living ones, without those that samplers read."""
    adapter_bytes: int = 0
    """What all living adapters take in an executor, as far as their size is known."""
    sessions: int = 0
    """Those that have not ended."""
    samplers: int = 0
    """Of sessions that have not ended, and whose weights are there."""
    checkpoints: int = 0
    """Saved or being saved, neither deleted nor expired."""
    stored_bytes: int = 0
    """Events, bodies and blobs, as they are stored."""

    def __add__(self, more: "Amounts") -> "Amounts":
        return Amounts(**{name: getattr(self, name) + getattr(more, name) for name in NAMES})


class Holding(msgspec.Struct, frozen=True):
    """What a tenant has, and what it may have."""

    used: Amounts
    limits: Amounts


NAMES = tuple(Amounts.__struct_fields__)

_WHAT = {
    "pending_requests": ("requests pending", "wait for their answers"),
    "pending_tokens": ("tokens pending, those to be sampled included", "wait for answers"),
    "adapters": ("adapters", "delete one"),
    "adapter_bytes": ("bytes of adapters in memory", "delete an adapter, or take a smaller rank"),
    "sessions": ("open sessions", "end one"),
    "samplers": ("samplers", "end a session that made some"),
    "checkpoints": ("checkpoints", "delete one, or let them expire"),
    "stored_bytes": ("stored bytes", "ask whoever runs the server to compact or erase, or for a higher limit"),
}
"""Quota -> what it counts, and what helps."""

_DRAINS = ("pending_requests", "pending_tokens")
"""Waiting alone helps."""

FREE: dict[type[kinds.Event], str] = {
    kinds.RemoveLoraRequested: "it frees an adapter, and an adapter is removed once",
    kinds.SampleCancelled: "one for each pending sample",
    kinds.SessionHeard: "a few in the time after which a session's silence ends it",
    kinds.SessionEnded: "one for each session",
    kinds.KeyRevoked: "one for each key",
    kinds.KeyCreated: "made by whoever runs the server",
    kinds.TenantConfigured: "made by whoever runs the server",
    kinds.TenantErased: "made by whoever runs the server",
    kinds.BulkCompacted: "the server's own",
    kinds.CheckpointWritten: "the server's own",
    kinds.BatchPlanned: "the server's own",
    kinds.BatchRan: "the server's own",
    kinds.BatchLost: "the server's own",
    kinds.EnvironmentRecorded: "the server's own",
    kinds.LeaseGranted: "the server's own",
    kinds.LogSealed: "the server's own",
}
"""Kinds of events that are never refused for a quota, besides results, and why they are bounded all the same."""


def is_limited(event: kinds.AnyEvent) -> bool:
    """Whether the tenant's limits hold for this event."""
    if isinstance(event, kinds.Result) or type(event) in FREE:
        return False
    # Room can only be made by what deletes.
    return not (isinstance(event, kinds.CheckpointChanged) and event.deleted)


def limits_of(defaults: Limits, own: dict[str, int | None]) -> Amounts:
    """The tenant's own limits (by name, without `max_`) where it has any, the server's otherwise."""
    return Amounts(**{
        name: getattr(defaults, f"max_{name}") if (limit := own.get(name)) is None else limit for name in NAMES
    })  # fmt: skip


def reserved_tokens(event: kinds.Event) -> int:
    """Tokens that a request may come to: those it brings and those that may be sampled for it, as far as it can be
    read."""
    match event:
        case kinds.SampleRequested():
            return event.num_tokens + event.params.num_samples * event.params.max_tokens
        case kinds.ForwardRequested() | kinds.ForwardBackwardRequested() | kinds.Unreadable():
            return event.num_tokens
        case _:
            return 0


def saved_bytes(num_parameters: int, with_optimizer: bool) -> int:
    """Of a checkpoint of so many parameters, near enough: fp32, and two moments of a state."""
    return 4 * num_parameters * (3 if with_optimizer else 1)


def added(new: NewEvent, num_bytes: int, num_parameters: int) -> Amounts:
    """What an event adds to what its tenant has. `num_bytes`: as it is stored; `num_parameters`: of its adapter, 0
    where unknown."""
    event = new.event
    requests = int(isinstance(event, kinds.Request))
    tokens = reserved_tokens(event) if isinstance(event, kinds.Request) else 0
    more = Amounts(pending_requests=requests, pending_tokens=tokens, stored_bytes=num_bytes)
    match event:
        case kinds.AddLoraRequested():
            own = new.adapter is None or not is_sampler(new.adapter)
            return more + Amounts(adapters=int(own), adapter_bytes=BYTES_PER_PARAMETER * event.num_parameters)
        case kinds.SaveRequested():
            return more + Amounts(checkpoints=1, stored_bytes=saved_bytes(num_parameters, event.use == "state"))
        case kinds.CheckpointCopied():
            return more + Amounts(checkpoints=1)
        case kinds.SessionStarted():
            return more + Amounts(sessions=1)
        case kinds.SamplerCreated():
            return more + Amounts(samplers=1)
        case _:
            return more


def answered(reserved: int) -> Amounts:
    """What a result adds: its request is not pending any more. `reserved`: the request's tokens."""
    return Amounts(pending_requests=-1, pending_tokens=-reserved)


def check(used: Amounts, limits: Amounts, more: Amounts, names: Collection[str] = NAMES) -> None:
    """Raises TooManyRequests for what is too much now and drains by itself, QuotaExceeded for what never fits or needs
    something to be deleted first."""
    for name in names:
        has, limit, asked = getattr(used, name), getattr(limits, name), getattr(more, name)
        if asked <= 0 or has + asked <= limit:
            continue
        what, help_ = _WHAT[name]
        detail = f"You have {has:,} of {limit:,} {what}; this takes {asked:,} more."
        extra = {"quota": name, "used": has, "limit": limit, "asked": asked}
        if asked > limit:
            raise QuotaExceeded(f"This takes {asked:,} {what}; your limit is {limit:,}.", **extra)
        if name in _DRAINS:
            raise TooManyRequests(detail, retry_after_s=RETRY_S, place=used.pending_requests, **extra)
        raise QuotaExceeded(f"{detail} To go on, {help_}.", **extra)
