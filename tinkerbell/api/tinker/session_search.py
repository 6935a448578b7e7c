"""Which of a tenant's sessions somebody looks for, newest first, a page at a time."""

from datetime import UTC, datetime, timedelta
from typing import Any

from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker.base import PROJECT, check_project
from tinkerbell.api.tinker.catalog import now_us
from tinkerbell.api.views import rfc3339
from tinkerbell.errors import Corrupt, InvalidRequest
from tinkerbell.events import kinds
from tinkerbell.events.rows import SessionRow
from tinkerbell.events.sessions import EXPIRED, end_key
from tinkerbell.events.store import EventStore
from tinkerbell.types import TenantId

SCANNED = 1000
"""Sessions that one request looks at; with a page that is not full comes the cursor to go on."""
_ROWS = 200

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def search(store: EventStore, tenant: TenantId, asked: m.SearchSessions) -> dict[str, Any]:
    """One page: at most `limit` sessions, of at most SCANNED. Blocking. Raises InvalidRequest, Corrupt."""
    for project in asked.project_ids or ():
        check_project(project, tenant)
    if asked.display_name is not None and not asked.display_name.split():
        raise InvalidRequest("display_name has no word to look for; leave it out.")
    page, last = _page(store, tenant, asked)
    saved = store.queries.storage_of_sessions([row.id for row, _ in page], now_us())
    return {
        "sessions": [_summary(row, status, saved.get(row.id, (0, 0))) for row, status in page],
        "next_cursor": None
        if last is None
        else {"last_created_at": rfc3339(last.created_us), "last_session_id": last.id},
    }


def _page(
    store: EventStore, tenant: TenantId, asked: m.SearchSessions
) -> tuple[list[tuple[SessionRow, dict[str, Any]]], SessionRow | None]:
    """Sessions with their status, and after which one the next page begins; None: there is none."""
    if asked.owner.type == "user" and tenant not in asked.owner.owner_urns:
        return [], None
    found: list[tuple[SessionRow, dict[str, Any]]] = []
    after = None if asked.cursor is None else (_us(asked.cursor.last_created_at), asked.cursor.last_session_id)
    for _ in range(SCANNED // _ROWS):
        rows = store.queries.sessions(tenant, after=after, limit=_ROWS)
        named = [row for row in rows if _is_named(row, asked)]
        for row, status in zip(named, _statuses(store, tenant, named), strict=True):
            if asked.statuses is None or any(_is_in(status, wanted) for wanted in asked.statuses):
                if len(found) == asked.limit:
                    return found, found[-1][0]
                found.append((row, status))
        if len(rows) < _ROWS:
            return found, None
        after = rows[-1].created_us, rows[-1].id
    return found, rows[-1]


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


def _statuses(store: EventStore, tenant: TenantId, rows: list[SessionRow]) -> list[dict[str, Any]]:
    """Of each: active until it said that it ended, or fell silent. Raises Corrupt."""
    ends = store.originals(tenant, [end_key(row.id) for row in rows if row.ended_us is not None])
    return [{"type": "active"} if row.ended_us is None else _end(row, ends.get(end_key(row.id))) for row in rows]


def _end(row: SessionRow, ended: kinds.Recorded | None) -> dict[str, Any]:
    if ended is None:
        raise Corrupt(f"the session {row.id} has ended, and no event says how")
    event = ended.event
    if not isinstance(event, kinds.SessionEnded):
        return {"type": "client_finished", "reason": {"type": "unknown"}, "detail": None}
    if event.reason == EXPIRED:
        return {"type": "cancelled", "detail": event.detail}
    return {"type": "client_finished", "reason": {"type": event.reason}, "detail": event.detail}


def _summary(row: SessionRow, status: dict[str, Any], saved: tuple[int, int]) -> dict[str, Any]:
    return {
        "session_id": row.id,
        "created_at": rfc3339(row.created_us),
        "owner": row.tenant,
        "project_id": PROJECT,
        "status": status,
        "checkpoints_count": saved[0],
        "display_name": row.display_name,
        "user_metadata": row.user_metadata or None,
        "checkpoint_storage_bytes": saved[1],
    }


def _us(at: datetime) -> int:
    """Microseconds since 1970."""
    if at.tzinfo is None:
        raise InvalidRequest("cursor: last_created_at has no time zone; give a response's next_cursor back unchanged.")
    return (at - _EPOCH) // timedelta(microseconds=1)
