"""What became of a request, by long poll."""

import asyncio
from typing import Any

import msgspec
from litestar import Response, Router, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.paging import MAX_POSITION
from tinkerbell.api.tinker import codec, reading
from tinkerbell.api.tinker import messages as m
from tinkerbell.errors import Corrupt, NotFound
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.rows import FutureRow

HOLD_S = 30.0
"""The SDK gives up on a poll after 45 s, and asks again at once after an answer that says: not yet."""


@post("/retrieve_future", status_code=200)
async def retrieve_future(
    data: JSONBody[m.RetrieveFuture], context: NamedDependency[Context], principal: NamedDependency[Principal]
) -> Response[Any]:
    """Protobuf for a forward_backward or a sample, JSON for everything else; 408 while there is no answer. It can be
    asked for any number of times."""
    number = int(data.request_id) if data.request_id.isdecimal() and len(data.request_id) < 20 else 0
    found = await context.waiter.wait(principal.tenant, number, HOLD_S) if 0 < number <= MAX_POSITION else None
    if found is None:
        raise NotFound(f"There is no request {data.request_id!r}.")
    row, result = found
    if row.state == "pending":
        return Response(m.TryAgain(request_id=data.request_id), status_code=408)
    answer = await asyncio.to_thread(_answer, context, row, result)
    if isinstance(answer, bytes):
        return Response(answer, media_type=codec.MEDIA_TYPE)
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _answer(context: Context, row: FutureRow, result: Recorded | None) -> bytes | dict[str, Any]:
    store = context.store
    if result is None and row.result_position is not None:
        result = store.get(row.result_position)
    request = store.get(row.id)
    if request is None or result is None:
        raise Corrupt(f"future {row.id} is {row.state} and has no result")
    return reading.answer(store, request, result)


router = Router(path="/", route_handlers=[retrieve_future])
