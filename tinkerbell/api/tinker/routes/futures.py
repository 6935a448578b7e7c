"""Futures of requests: waited for by long poll, or given up."""

import asyncio
import contextlib
from typing import Any

import msgspec
from litestar import Response, Router, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.shares import POLL
from tinkerbell.api.tinker import codec, names, reading
from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker.dependencies import Submit
from tinkerbell.errors import Corrupt
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.rows import AnsweredRow, FutureRow

HOLD_S = 30.0
"""The SDK gives up on a poll after 45 s, and asks again at once after an answer that says: not yet."""

PAGE = 1000
"""Answers looked at in one read,"""
SPAN = 20_000
"""of so many events of the log."""


@post("/retrieve_future", status_code=200, opt=POLL)
async def retrieve_future(
    data: JSONBody[m.RetrieveFuture], context: NamedDependency[Context], principal: NamedDependency[Principal]
) -> Response[Any]:
    """Protobuf for a forward_backward or a sample, JSON for everything else; 408 while there is no answer. It can be
    asked for any number of times."""
    found = await context.waiter.wait(principal.tenant, names.request_position(data.request_id), HOLD_S)
    if found is None:
        raise names.no_request(data.request_id)
    row, result = found
    if row.state == "pending":
        return Response(m.TryAgain(request_id=data.request_id), status_code=408)
    answer = await context.read(principal.tenant, _answer, context, row, result)
    if isinstance(answer, bytes):
        return Response(answer, media_type=codec.MEDIA_TYPE)
    return Response(msgspec.json.encode(answer), media_type="application/json")


@post("/retrieve_futures", status_code=200, opt=POLL)
async def retrieve_futures(
    data: JSONBody[m.RetrieveFutures],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    submit: NamedDependency[Submit],
) -> m.Completions:
    """Which samples of a sampling session were answered since the cursor, as soon as any were; with none, an empty list
    after half a minute or `timeout`. Answers stay where they are: `retrieved_request_ids` needs no reply."""
    sampler = await context.read(principal.tenant, submit(None).sampler, data.target.sampling_session_id)
    key = f"tinker:{sampler.id}:"
    loop = asyncio.get_running_loop()
    deadline = loop.time() + (HOLD_S if data.timeout is None else min(data.timeout, HOLD_S))
    cursor = data.prev_cursor
    if cursor == 0:
        # What came before the sampler is none of its answers.
        made = await context.read(principal.tenant, context.store.original, principal.tenant, f"tinker:{sampler.id}")
        cursor = made.recorded.position if made is not None else 0

    def read() -> tuple[list[AnsweredRow], int, bool]:
        head = context.store.head()
        until = min(head, cursor + SPAN)
        rows = context.store.queries.answered_samples(principal.tenant, key, cursor, until, PAGE)
        full = len(rows) == PAGE
        return rows, rows[-1].result_position if full else max(until, cursor), until == head and not full

    with context.waiter.watching(principal.tenant) as answered:
        while True:
            answered.clear()
            rows, cursor, is_all = await context.read(principal.tenant, read)
            found = [row for row in rows if _client_of(row, key) == data.target.cloned_sampler_id]
            left_s = deadline - loop.time()
            if found or left_s <= 0 or context.waiter.stopped or not is_all:
                # Where there is more to look at, the client asks again from here.
                return m.Completions(completions=[_completion(row) for row in found], cursor=cursor)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(answered.wait(), left_s)


def _client_of(row: AnsweredRow, key: str) -> int:
    return int(row.idempotency_key.removeprefix(key)) // m.CLONE_SEQS


def _completion(row: AnsweredRow) -> m.Completion:
    if row.state == "failed":
        return m.Completion(state="failed", request_id=str(row.id))
    size = msgspec.UNSET if row.num_bytes is None else row.num_bytes
    return m.Completion(state="finished", request_id=str(row.id), response_payload_uncompressed_size=size)


@post("/cancel_future", status_code=204)
async def cancel_future(data: JSONBody[m.RetrieveFuture], submit: NamedDependency[Submit]) -> None:
    """A sample that waits fails, and is not charged for what did not run. A batch that runs is not interrupted: it
    may still complete the sample. What has its answer keeps it."""
    await submit(None).cancel_sample(data.request_id)


def _answer(context: Context, row: FutureRow, result: Recorded | None) -> bytes | dict[str, Any]:
    store = context.store
    if result is None and row.result_position is not None:
        result = store.get(row.result_position)
    request = store.get(row.id)
    if request is None or result is None:
        raise Corrupt(f"future {row.id} is {row.state} and has no result")
    return reading.answer(store, request, result)


router = Router(path="/", route_handlers=[retrieve_future, retrieve_futures, cancel_future])
