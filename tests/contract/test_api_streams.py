"""Streams of events: one reader feeds all of a tenant's, and the log is read for what was there before."""

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support import log
from tests.support.api_driver import ApiDriver, record_environment
from tinkerbell.api.auth import Principal
from tinkerbell.api.feed import STREAMS_AT_ONCE, WINDOW_EVENTS
from tinkerbell.api.routes.events import follow
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore

ALICE = Principal(tenant="alice", key_id=None, admin=False)
PATIENCE_S = 60.0


@pytest.fixture
def api(database_settings: Settings, store: EventStore) -> Iterator[ApiDriver]:
    record_environment(store)
    with ApiDriver(database_settings, store) as driver:
        yield driver


@contextmanager
def reads_of_events(store: EventStore) -> Iterator[list[str]]:
    """Statements that read the log meanwhile."""
    seen: list[str] = []

    def look(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "FROM events" in statement and "coalesce" not in statement:
            seen.append(statement)

    sa.event.listen(store._read_engine, "before_cursor_execute", look)
    yield seen
    sa.event.remove(store._read_engine, "before_cursor_execute", look)


async def positions(stream: AsyncGenerator[bytes, None], count: int) -> list[int]:
    """Of the next events."""
    found: list[int] = []
    while len(found) < count:
        chunk = await asyncio.wait_for(anext(stream), PATIENCE_S)
        found += [int(id) for id in re.findall(rb"id: (\d+)\r?\nevent: ", chunk)]
    return found


async def caught_up(api: ApiDriver) -> None:
    """The feed has heard of all that happened."""
    while api.app.state.context.feed._head < api.store.head():
        await asyncio.sleep(0.01)


def test_all_streams_of_a_tenant_are_fed_without_reading_the_log(api: ApiDriver) -> None:
    store, num_streams, num_events = api.store, 3 * STREAMS_AT_ONCE, 30
    store.append(log.add_lora())

    async def scenario() -> None:
        await caught_up(api)
        streams = [follow(api.app.state.context, ALICE, store.head(), None) for _ in range(num_streams)]
        for stream in streams:
            await anext(stream)
        with reads_of_events(store) as reads:
            readers = [asyncio.create_task(positions(stream, num_events)) for stream in streams]
            for _ in range(num_events):
                await asyncio.to_thread(store.append, log.forward_backward(), log.sample(None, "bob"))
            found = await asyncio.gather(*readers)
        mine = [event.position for event in store.read(tenant="alice")][1:]
        assert all(each == mine for each in found)
        assert reads == []
        for stream in streams:
            await stream.aclose()
        assert api.app.state.context.feed._windows == {}

    api.run(scenario())


def test_a_stream_that_is_behind_reads_pages_and_then_what_comes(api: ApiDriver) -> None:
    store = api.store
    store.append(log.add_lora())
    store.append(*(log.optim_step() for _ in range(450)))

    async def scenario() -> None:
        await caught_up(api)
        stream = follow(api.app.state.context, ALICE, 0, None)
        await anext(stream)
        with reads_of_events(store) as reads:
            found = await positions(stream, 451)
            await asyncio.to_thread(store.append, log.optim_step(), log.add_lora("ad_two"))
            found += await positions(stream, 2)
        assert found == [event.position for event in store.read(tenant="alice")]
        assert len(reads) == 3, "pages of 200"
        assert all("events.body," not in statement for statement in reads)
        await stream.aclose()

    api.run(scenario())


def test_a_stream_that_does_not_keep_up_misses_nothing(api: ApiDriver) -> None:
    store = api.store
    store.append(log.add_lora(), log.add_lora("ad_two"))

    async def scenario() -> None:
        await caught_up(api)
        slow = follow(api.app.state.context, ALICE, store.head(), None)
        only = follow(api.app.state.context, ALICE, store.head(), "ad_two")
        await anext(slow)
        await anext(only)
        half = WINDOW_EVENTS // 2 + 10
        for _ in range(3):
            await asyncio.to_thread(store.append, *(log.optim_step() for _ in range(half)))
            await asyncio.to_thread(store.append, log.optim_step("ad_two"))
        mine = store.read(tenant="alice", limit=10_000)[2:]
        assert await positions(slow, len(mine)) == [event.position for event in mine]
        assert await positions(only, 3) == [event.position for event in mine if event.adapter == "ad_two"]
        await slow.aclose()
        await only.aclose()

    api.run(scenario())
