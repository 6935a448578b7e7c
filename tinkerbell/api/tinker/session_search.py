"""Which of a tenant's sessions somebody looks for, newest first, a page at a time."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker import names
from tinkerbell.api.tinker.base import PROJECT, check_project
from tinkerbell.api.tinker.catalog import now_us
from tinkerbell.api.views import rfc3339
from tinkerbell.errors import Corrupt, InvalidRequest
from tinkerbell.events import kinds
from tinkerbell.events.rows import CheckpointRow, SessionRow
from tinkerbell.events.sessions import EXPIRED, end_key
from tinkerbell.events.store import EventStore
from tinkerbell.types import TenantId

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def search(store: EventStore, tenant: TenantId, asked: m.SearchSessions) -> dict[str, Any]:
    """One page. Blocking. Raises InvalidRequest, Corrupt."""
    for project in asked.project_ids or ():
        check_project(project, tenant)
    if asked.display_name is not None and not asked.display_name.split():
        raise InvalidRequest("display_name has no word to look for; leave it out.")
    found = list(islice(_matches(store, tenant, asked), asked.limit + 1))
    page = found[: asked.limit]
    saved: dict[str, list[CheckpointRow]] = {}
    for row in store.queries.checkpoints(tenant) if page else ():
        if row.is_usable(now_us()):
            saved.setdefault(names.session_of(row.adapter), []).append(row)
    return {
        "sessions": [_summary(row, status, saved.get(row.id, [])) for row, status in page],
        "next_cursor": None
        if len(found) <= asked.limit
        else {"last_created_at": rfc3339(page[-1][0].created_us), "last_session_id": page[-1][0].id},
    }


def _matches(
    store: EventStore, tenant: TenantId, asked: m.SearchSessions
) -> Iterator[tuple[SessionRow, dict[str, Any]]]:
    """With their status."""
    if asked.owner.type == "user" and tenant not in asked.owner.owner_urns:
        return
    after = None if asked.cursor is None else (-_us(asked.cursor.last_created_at), asked.cursor.last_session_id)
    for row in store.queries.sessions(tenant):
        if (after is None or (-row.created_us, row.id) > after) and _is_named(row, asked):
            status = _status(store, row)
            if asked.statuses is None or any(_is_in(status, wanted) for wanted in asked.statuses):
                yield row, status


def _is_named(row: SessionRow, asked: m.SearchSessions) -> bool:
    if any(row.user_metadata.get(name) != value for name, value in asked.user_metadata.items()):
        return False
    if asked.session_id is None and asked.display_name is None:
        return True
    words = [] if asked.display_name is None else asked.display_name.casefold().split()
    title = (row.display_name or "").casefold()
    return row.id == asked.session_id or (bool(words) and all(word in title for word in words))


def _is_in(status: dict[str, Any], wanted: m.SessionStatusQuery) -> bool:
    if status["type"] != wanted.type:
        return False
    return wanted.reasons is None or status.get("reason", {}).get("type") in wanted.reasons


def _status(store: EventStore, row: SessionRow) -> dict[str, Any]:
    """Active until it said that it ended, or fell silent. Raises Corrupt."""
    if row.ended_us is None:
        return {"type": "active"}
    ended = store.original(row.tenant, end_key(row.id))
    if ended is None:
        raise Corrupt(f"the session {row.id} has ended, and no event says how")
    event = ended.recorded.event
    assert isinstance(event, kinds.SessionEnded)
    if event.reason == EXPIRED:
        return {"type": "cancelled", "detail": event.detail}
    return {"type": "client_finished", "reason": {"type": event.reason}, "detail": event.detail}


def _summary(row: SessionRow, status: dict[str, Any], saved: list[CheckpointRow]) -> dict[str, Any]:
    return {
        "session_id": row.id,
        "created_at": rfc3339(row.created_us),
        "owner": row.tenant,
        "project_id": PROJECT,
        "status": status,
        "checkpoints_count": len(saved),
        "display_name": row.display_name,
        "user_metadata": row.user_metadata or None,
        "checkpoint_storage_bytes": sum(each.num_bytes for each in saved),
    }


def _us(at: datetime) -> int:
    """Microseconds since 1970."""
    if at.tzinfo is None:
        raise InvalidRequest("cursor: last_created_at has no time zone; give a response's next_cursor back unchanged.")
    return (at - _EPOCH) // timedelta(microseconds=1)
