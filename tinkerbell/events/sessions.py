"""The end of a session, by its own word or because it fell silent: one and the same events.

First it ends, and from then on the log takes nothing that would be made within it. Only then is it known what it made,
and all of that is asked to leave the executor. Whoever is interrupted in between leaves adapters behind, which anybody
may `clear` later.
"""

import hashlib
from typing import Any

import msgspec

from tinkerbell.errors import NotFound
from tinkerbell.events import kinds
from tinkerbell.events.kinds import AnyEvent, NewEvent
from tinkerbell.events.store import EventStore
from tinkerbell.types import AdapterId, SessionId, TenantId

EXPIRED = "expired"
"""The reason of one that fell silent."""


def end_key(session: SessionId) -> str:
    """By which the end of a session is known: it has one."""
    return f"tinker:end:{session}"


def end(
    store: EventStore, tenant: TenantId, session: SessionId, reason: str, detail: str | None, **envelope: Any
) -> int:
    """End it if it has not ended, and `clear` it. `envelope`: who does it, as in NewEvent. Blocking."""
    ended = kinds.SessionEnded(session=session, reason=reason, detail=detail)
    key = end_key(session)
    new = NewEvent(event=ended, tenant=tenant, stream=f"tenant/{tenant}", **_once(key), **envelope)
    store.append(new)
    return clear(store, tenant, session, **envelope)


def clear(store: EventStore, tenant: TenantId, session: SessionId, **envelope: Any) -> int:
    """Ask every adapter of an ended session to leave the executor, unless it is asked already; how many were.

    One whose removal failed is asked again. Blocking.
    """
    asked = 0
    for row in store.queries.living_adapters(tenant, session):
        asked += ask_to_leave(store, tenant, row.id, **envelope)
    return asked


def ask_to_leave(store: EventStore, tenant: TenantId, adapter: AdapterId, **envelope: Any) -> bool:
    """Ask one adapter of a session to leave the executor, unless it is asked already; whether it was. Blocking."""
    attempts, waits = store.queries.attempts(tenant, adapter, "remove_lora")
    if waits:
        return False
    try:
        store.append(msgspec.structs.replace(_removal(tenant, adapter, attempts), **envelope))
    except NotFound:
        return False  # somebody removed it meanwhile
    return True


def _removal(tenant: TenantId, adapter: AdapterId, attempt: int) -> NewEvent:
    event: AnyEvent = kinds.RemoveLoraRequested()
    key = f"tinker:remove:{adapter}:{attempt}"
    return NewEvent(event=event, tenant=tenant, stream=f"adapter/{adapter}", adapter=adapter, **_once(key))


def _once(key: str) -> dict[str, Any]:
    """What makes an event happen once, whoever asks for it at the same time."""
    return {"idempotency_key": key, "request_hash": hashlib.sha256(key.encode()).digest()}
