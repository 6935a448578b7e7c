"""What a tenant used and did, and the key it came with, from the views that `/v1` and auditors read."""

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal

from litestar import Router, delete, get
from litestar.di import NamedDependency
from litestar.params import FromQuery, QueryParameter

from tinkerbell.api.auth import REVOKED_TOO, Principal
from tinkerbell.api.context import Context
from tinkerbell.api.tinker import names
from tinkerbell.api.tinker.base import base_model
from tinkerbell.api.tinker.catalog import now_us
from tinkerbell.api.tinker.dependencies import Submit
from tinkerbell.api.views import rfc3339
from tinkerbell.errors import InvalidRequest, TooLarge
from tinkerbell.events import kinds
from tinkerbell.events.rows import HourOfUsage
from tinkerbell.events.store import EventStore

LONGEST_BILL = timedelta(days=14)
MOST_ENTRIES = 10_000
GIGABYTE = 1_000_000_000
HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US

AUDITED: dict[str, tuple[str, ...]] = {
    "checkpoints": ("save.requested", "load.requested", "checkpoint.changed", "checkpoint.copied"),
    "organizations": ("key.created", "key.revoked", "tenant.configured", "tenant.erased", "bulk.compacted"),
    "projects": (),
    "teams": (),
    "all": ("session.started", "session.ended", "sampler.created", "add_lora.requested", "remove_lora.requested"),
}
AUDITED["all"] += AUDITED["checkpoints"] + AUDITED["organizations"]
"""What is asked for -> types of events. Data, gradients and samples are in `tinkerbell replay` and `/v1/events`."""

_SECRET = {"key_hash"}


@get("/billing/usage/events")
async def list_usage(
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    starting_on: FromQuery[datetime],
    ending_before: FromQuery[datetime],
) -> dict[str, Any]:
    """Tokens by the hour, model and session. Money is not counted here."""
    begin, end = (_hour(name, at) for name, at in (("starting_on", starting_on), ("ending_before", ending_before)))
    if not timedelta() < end - begin <= LONGEST_BILL:
        raise InvalidRequest("ending_before must be after starting_on, by 14 days at most.")

    def read() -> dict[str, Any]:
        queries = context.store.queries
        rows = queries.usage_by_hour(principal.tenant, _us(begin), _us(end), MOST_ENTRIES + 1)
        if len(rows) > MOST_ENTRIES:
            raise TooLarge(f"There are more than {MOST_ENTRIES} entries in this time; ask for fewer hours.")
        name = base_model(context.model())
        events = [bucket for row in rows for bucket in _buckets(row, name)]
        named = {event["session_id"] for event in events if event["session_id"] is not None}
        sessions = queries.sessions_named(principal.tenant, named)
        return {"data": events, "sessions": {row.id: {"user_metadata": row.user_metadata or None} for row in sessions}}

    return await context.read(principal.tenant, read)


@get("/billing/usage/checkpoints/current")
async def show_storage(context: NamedDependency[Context], principal: NamedDependency[Principal]) -> dict[str, Any]:
    """How much the tenant's checkpoints hold."""
    ask_for = context.store.queries.storage
    number, size = await context.read(principal.tenant, ask_for, principal.tenant, now_us())
    held = {"checkpoint_count": number, "size_bytes": size, "size_gigabytes": size / GIGABYTE}
    return {"data": [{"user_name": principal.tenant, **held}] if number else []}


@get("/audit")
async def show_audit_log(
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    event_type: FromQuery[Literal["all", "checkpoints", "projects", "teams", "organizations"]] = "all",
    day: Annotated[date | None, QueryParameter(description="UTC; absent: today.")] = None,
) -> dict[str, Any]:
    """Who did what on a day: the tenant's own log without the requests that carry data."""
    begin = datetime.combine(day or datetime.now(UTC).date(), datetime.min.time(), UTC)
    types = AUDITED[event_type]
    entries = (
        await context.read(principal.tenant, _entries, context.store, principal.tenant, types, begin) if types else []
    )
    return {"entries": entries}


@get("/auth/apikey/me")
async def show_key(context: NamedDependency[Context], principal: NamedDependency[Principal]) -> dict[str, Any]:
    """The key this was asked with; a server without keys knows one user only."""
    row = None
    if principal.key_id is not None:
        row = await context.read(principal.tenant, context.store.queries.key, principal.key_id)
    return {
        # The SDK expects a number. Keys are told apart by their names.
        "key_id": 0 if row is None else row.created_us,
        "name": "local" if row is None else row.key_id,
        "note": "" if row is None else row.note,
        "details": {"org_details": {"name": principal.tenant}, "user_details": {"email": ""}},
    }


@delete("/auth/apikey/me", status_code=204, opt=REVOKED_TOO)
async def revoke_key(principal: NamedDependency[Principal], submit: NamedDependency[Submit]) -> None:
    """Nobody gets in with it from now on; asked again, nothing more happens."""
    if principal.key_id is None:
        raise InvalidRequest("This server runs without keys; there is none to revoke.")
    await submit(None).revoke_key(principal.key_id)


def _hour(name: str, at: datetime) -> datetime:
    try:
        utc = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except OverflowError as error:
        raise InvalidRequest(f"{name} is {at.isoformat()}, which is no time that UTC has.") from error
    if utc != utc.replace(minute=0, second=0, microsecond=0):
        raise InvalidRequest(f"{name} is {at.isoformat()}; it must be a full hour.")
    return utc


def _us(at: datetime) -> int:
    return int(at.timestamp()) * 1_000_000


def _buckets(row: HourOfUsage, model: str) -> list[dict[str, Any]]:
    session = names.session_of(row.adapter) if row.adapter and ":" in row.adapter else None
    envelope = {
        "bucket_start": rfc3339(row.hour_us),
        "bucket_end": rfc3339(row.hour_us + HOUR_US),
        "base_model": model,
        "session_id": session,
    }
    match row.kind:
        case "forward" | "forward_backward":
            infos: list[dict[str, Any]] = [{"type": "training", "token_count": row.tokens_in}]
        case "sample":
            infos = [
                {"type": "sampling_prefill", "cached": False, "token_count": row.tokens_in},
                {"type": "sampling_sample", "token_count": row.tokens_out},
            ]
        case "save":
            infos = [{"type": "checkpoint", "count": row.num_requests}]
        case _:
            infos = []
    return [{**envelope, "event_info": info} for info in infos]


def _entries(store: EventStore, tenant: str, types: tuple[str, ...], begin: datetime) -> list[dict[str, Any]]:
    """Of the 24 hours from `begin`, oldest first. Raises TooLarge."""
    span_us = (_us(begin), _us(begin) + DAY_US)
    found = store.audited(tenant, types, span_us, MOST_ENTRIES + 1)
    if len(found) > MOST_ENTRIES:
        raise TooLarge(f"This day has more than {MOST_ENTRIES} entries; read the view audit_log, or ask by event_type.")
    return [_entry(recorded) for recorded in found]


def _entry(recorded: kinds.Recorded) -> dict[str, Any]:
    said = {
        name: value
        for name, value in kinds.facts_of(recorded.event).items()
        if name not in _SECRET and value not in (None, {}, [])
    }
    event = recorded.event
    path = None
    if isinstance(event, kinds.SaveRequested) and recorded.adapter is not None:
        path = str(names.Path(recorded.adapter, event.use, event.name or event.checkpoint))
    elif isinstance(event, kinds.CheckpointCopied) and recorded.adapter is not None:
        path = str(names.Path(recorded.adapter, event.use, event.name))
    return {
        "timestamp": rfc3339(recorded.at_us),
        "event": kinds.type_of(event).replace(".", "_"),
        "event_details": {"position": recorded.position, "key": recorded.actor, "model_id": recorded.adapter} | said,
        "model_id": recorded.adapter if path is not None else None,
        "tinker_path": path,
    }


router = Router(path="/", route_handlers=[list_usage, show_storage, show_audit_log, show_key, revoke_key])
