"""The end of a session, by its own word or because it fell silent: one and the same events."""

import hashlib

from tinkerbell.events import kinds
from tinkerbell.events.kinds import AnyEvent, NewEvent
from tinkerbell.events.queries import Queries
from tinkerbell.types import AdapterId, SessionId, TenantId

EXPIRED = "expired"
"""The reason of one that fell silent."""


def end_key(session: SessionId) -> str:
    """By which the end of a session is known: it has one."""
    return f"tinker:end:{session}"


def ending(
    queries: Queries, tenant: TenantId, session: SessionId, reason: str, detail: str | None
) -> tuple[NewEvent, ...]:
    """What it made is asked to leave the executor, and it can make nothing more. To be appended together."""
    removed = [
        _once(kinds.RemoveLoraRequested(), tenant, f"tinker:remove:{row.id}", adapter=row.id)
        for row in queries.living_adapters(tenant, session)
    ]
    ended = kinds.SessionEnded(session=session, reason=reason, detail=detail)
    return (*removed, _once(ended, tenant, end_key(session)))


def _once(event: AnyEvent, tenant: TenantId, key: str, adapter: AdapterId | None = None) -> NewEvent:
    return NewEvent(
        event=event,
        tenant=tenant,
        stream=f"tenant/{tenant}" if adapter is None else f"adapter/{adapter}",
        adapter=adapter,
        idempotency_key=key,
        request_hash=hashlib.sha256(key.encode()).digest(),
    )
