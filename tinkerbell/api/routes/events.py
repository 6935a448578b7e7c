"""The log as a stream of server-sent events, resumable at any position."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated

from litestar import Router, get
from litestar.di import NamedDependency
from litestar.params import HeaderParameter, QueryParameter
from litestar.response import ServerSentEventMessage, Stream

from tinkerbell.api import validation
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.feed import Line, line_of
from tinkerbell.api.paging import MAX_POSITION
from tinkerbell.api.problems import problems
from tinkerbell.api.shares import STREAM
from tinkerbell.events.store import EventStore
from tinkerbell.types import AdapterId, TenantId

PING_S = 10.0
"""A comment after this long without events keeps proxies from closing the connection."""

_PING = ServerSentEventMessage(comment="ping", data=None).encode()
_HEADERS = {"Cache-Control": "no-cache", "Connection": "keep-alive", "X-Accel-Buffering": "no"}

_PAGE = 200
"""Events read at a time: what a slow reader holds in memory."""

After = Annotated[
    int | None,
    QueryParameter(
        ge=0,
        le=MAX_POSITION,
        description="Start after this position: 0 is the whole log; absent: only what comes.",
    ),
]
LastEventId = Annotated[
    int | None,
    HeaderParameter(
        name="Last-Event-ID",
        ge=0,
        le=MAX_POSITION,
        description="Where a broken stream goes on; browsers send it by themselves. Wins over `after`.",
    ),
]
Adapter = Annotated[str | None, QueryParameter(name="adapter_id", description="Only this adapter's events.")]


@get(
    "/events",
    operation_id="stream_events",
    opt=STREAM,
    summary="Your log as it grows",
    tags=["log"],
    media_type="text/event-stream",
    responses=problems(404),
)
async def stream_events(
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    after: After = None,
    last_event_id: LastEventId = None,
    adapter_id: Adapter = None,
) -> Stream:
    """Server-sent events: `id` is the position, `event` the type, `data` a LogEvent. Ends when the server
    stops or the key is revoked; reconnect with `Last-Event-ID`."""
    if adapter_id is not None:
        queries = context.store.queries
        row = await context.read(principal.tenant, queries.adapter, principal.tenant, validation.adapter_id(adapter_id))
        if row is None:
            raise validation.no_adapter(adapter_id)
    position = last_event_id if last_event_id is not None else after
    if position is None:
        position = await context.read(principal.tenant, context.store.head)
    lines = follow(context, principal, position, adapter_id)
    return Stream(lines, media_type="text/event-stream", headers=_HEADERS)


async def follow(
    context: Context, principal: Principal, position: int, adapter: AdapterId | None
) -> AsyncGenerator[bytes, None]:
    """The events after a position as they come, until the server stops or the key is revoked. The log is read for what
    was there before, a page at a time; what comes is the same lines for all streams of the tenant."""
    tenant, store = principal.tenant, context.store
    with context.feed.window(tenant) as (window, bell):
        # An id without data is no event, but where a reader goes on that loses the stream before the first.
        yield ServerSentEventMessage(id=position, comment=f"after {position}", data=None).encode()
        while not context.stopping.is_set():
            bell.clear()
            if not await context.gate.still_valid(principal):
                return
            complete = position >= window.after
            if complete:
                lines = window.lines_after(position)
            else:
                newest = window.after
                lines = await context.read(tenant, _page, store, tenant, position, adapter)
                # A page that is not full has all there was, and what is in the window came later.
                position = max(position, newest) if len(lines) < _PAGE else position
            if lines and not context.stopping.is_set():
                position = max(position, lines[-1].position)
                if content := b"".join(line.content for line in lines if adapter in (None, line.adapter)):
                    yield content
            if complete and not await _rang(bell, PING_S):
                yield _PING


def _page(store: EventStore, tenant: TenantId, position: int, adapter: AdapterId | None) -> list[Line]:
    events = store.read(position, limit=_PAGE, tenant=tenant, adapter=adapter, bodies=False)
    return [line_of(recorded) for recorded in events]


async def _rang(bell: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await bell.wait()
    except TimeoutError:
        return False
    return True


router = Router(path="/", route_handlers=[stream_events])
