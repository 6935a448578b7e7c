"""Futures: what became of a request; by long poll."""

import logging
from typing import Annotated

from litestar import Router, get
from litestar.di import NamedDependency
from litestar.params import FromPath, QueryParameter

from tinkerbell import wire
from tinkerbell.api import views
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.paging import MAX_POSITION, Limit
from tinkerbell.api.problems import problems
from tinkerbell.api.shares import POLL
from tinkerbell.errors import Corrupt, KeyUnavailable, NotFound
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.rows import FutureRow
from tinkerbell.types import TenantId

log = logging.getLogger("tinkerbell.api")

_TAGS = ["futures"]

WaitS = Annotated[float, QueryParameter(ge=0, le=60, description="Seconds to wait for the answer; 0 answers at once.")]
After = Annotated[int, QueryParameter(ge=0, le=MAX_POSITION, description="Only those with a larger id.")]


async def wait_for(context: Context, tenant: TenantId, future_id: int, wait_s: float) -> wire.Future:
    """The future, with its answer if there is one within `wait_s` seconds. Raises NotFound."""
    found = await context.waiter.wait(tenant, future_id, wait_s) if 0 < future_id <= MAX_POSITION else None
    if found is None:
        raise NotFound(f"There is no future {future_id}.")
    row, result = found
    if result is not None and (result.body is not None or result.body_codec is None):
        # It came with its answer: nothing is left to read.
        return _view(context, row, result)
    return await context.read(tenant, _view, context, row, result)


def _view(context: Context, row: FutureRow, result: Recorded | None) -> wire.Future:
    store = context.store
    if row.state == "pending":
        return views.future(row, place=store.queries.place(row.tenant, row.id))
    if result is None and row.result_position is not None:
        result = store.get(row.result_position)
    if result is None:
        raise Corrupt(f"future {row.id} is {row.state} and has no result")
    try:
        return views.answered(row, result, store.body(result))
    except (Corrupt, KeyUnavailable) as exc:
        log.error("the answer of request %d cannot be read: %s", row.id, exc)
        return views.unreadable(row, exc.detail)


@get(
    "/futures/{future_id:int}",
    operation_id="show_future",
    opt=POLL,
    summary="A future",
    tags=_TAGS,
    responses=problems(404, 410, 429),
)
async def show_future(
    future_id: FromPath[int],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    wait_s: WaitS = 0.0,
) -> wire.Future:
    """Waits up to `wait_s` seconds for the answer; a pending one then comes back as it is. Answers are kept
    until whoever runs the server removes them, and may be read any number of times."""
    return await wait_for(context, principal.tenant, future_id, wait_s)


@get("/futures", operation_id="list_futures", summary="Your pending futures", tags=_TAGS, responses=problems())
async def list_futures(
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    after: After = 0,
    limit: Limit = 100,
) -> list[wire.Future]:
    """In the order they were accepted; the next page is `after` the last id."""

    def read() -> list[wire.Future]:
        queries = context.store.queries
        rows = queries.pending(principal.tenant, after=after, limit=limit)
        first = queries.place(principal.tenant, rows[0].id) if rows else 0
        return [views.future(row, place=place) for place, row in enumerate(rows, first)]

    return await context.read(principal.tenant, read)


router = Router(path="/", route_handlers=[show_future, list_futures])
