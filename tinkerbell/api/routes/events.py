"""The log as a stream of server-sent events, resumable at any position."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated

import msgspec
from litestar import Router, get
from litestar.di import NamedDependency
from litestar.params import HeaderParameter, QueryParameter
from litestar.response import ServerSentEvent, ServerSentEventMessage

from tinkerbell.api import validation, views
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.paging import MAX_POSITION
from tinkerbell.api.problems import problems
from tinkerbell.types import AdapterId

PING_S = 10.0
"""A comment after this long without events keeps proxies from closing the connection."""

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
) -> ServerSentEvent:
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
    return ServerSentEvent(_follow(context, principal, position, adapter_id))


async def _follow(
    context: Context, principal: Principal, position: int, adapter: AdapterId | None
) -> AsyncGenerator[ServerSentEventMessage, None]:
    store = context.store
    with context.doorbell.bell(principal.tenant) as bell:
        # An id without data is no event, but where a reader goes on that loses the stream before the first.
        yield ServerSentEventMessage(id=position, comment=f"after {position}", data=None)
        while not context.stopping.is_set():
            bell.clear()
            if not await context.gate.still_valid(principal):
                return
            page = await context.read(
                principal.tenant, store.read, position, limit=_PAGE, tenant=principal.tenant, adapter=adapter
            )
            for recorded in page:
                if context.stopping.is_set():
                    return
                position = recorded.position
                view = views.log_event(recorded)
                yield ServerSentEventMessage(id=position, event=view.type, data=msgspec.json.encode(view))
            if len(page) < _PAGE and not await _rang(bell, PING_S):
                yield ServerSentEventMessage(comment="ping", data=None)


async def _rang(bell: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await bell.wait()
    except TimeoutError:
        return False
    return True


router = Router(path="/", route_handlers=[stream_events])
