"""A subscriber sees every event exactly once, in order, whoever wrote it (invariant I11). On SQLite and Postgres."""

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from tests.support import log
from tests.support.waiting import AT_ONCE_S, PATIENCE_S
from tinkerbell.config import Settings
from tinkerbell.errors import Unavailable
from tinkerbell.events import tail
from tinkerbell.events.futures import FutureWaiter
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.store import EventStore
from tinkerbell.events.tail import PAGE_EVENTS


async def in_thread(_tenant: str, call: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.to_thread(call, *args)


class Reader:
    """A subscriber that notes positions and can be waited for."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self._changed = threading.Condition()

    def __call__(self, events: Sequence[Recorded]) -> None:
        with self._changed:
            self.positions += [item.position for item in events]
            self._changed.notify_all()

    def wait_for(self, position: int, timeout_s: float = PATIENCE_S) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.positions and self.positions[-1] >= position, timeout_s)


def write_from_another_process(settings: bytes, name: str, count: int) -> None:
    """Runs in a child: an adapter of its own with many requests, some of them several together."""
    store = EventStore.open(msgspec.json.decode(settings, type=Settings))
    store.append(log.add_lora(name))
    for number in range(count):
        (asked, _) = store.append(log.sample(name), log.forward_backward(name, key=f"{name}-{number}"))
        store.append(log.sample_completed(asked))
    store.close()


def test_two_processes_write_and_everybody_sees_all(store: EventStore, database_settings: Settings) -> None:
    reader, late = Reader(), Reader()
    store.subscribe(reader)
    context = multiprocessing.get_context("spawn")
    encoded = msgspec.json.encode(database_settings)
    children = [
        context.Process(target=write_from_another_process, args=(encoded, f"ad_child{n}", 20)) for n in range(2)
    ]
    for child in children:
        child.start()
    own = 0
    store.append(log.add_lora("ad_own"))
    while any(child.is_alive() for child in children):
        store.append(log.forward_backward("ad_own"))
        own += 1
    for child in children:
        child.join()
        assert child.exitcode == 0
    head = store.head()
    assert head == 3 + 2 * 20 * 3 + own
    reader.wait_for(head)
    store.subscribe(late, after=5)
    late.wait_for(head)
    assert reader.positions == list(range(1, head + 1))
    assert late.positions == list(range(6, head + 1))
    report = store.check()
    assert report.num_events == head and report.num_results == 40


def test_a_subscriber_far_behind_catches_up_while_others_go_on(sqlite_store: EventStore) -> None:
    store = sqlite_store
    store.append(log.configured(max_pending_requests=4 * PAGE_EVENTS), log.add_lora())
    futures = [store.submit(log.optim_step()) for _ in range(2 * PAGE_EVENTS + 50)]
    head = futures[-1].result()[0].position
    live, behind = Reader(), Reader()
    store.subscribe(live)
    store.subscribe(behind, after=0)
    (newest,) = store.append(log.optim_step())
    live.wait_for(newest.position)
    behind.wait_for(newest.position)
    assert live.positions == [head + 1]
    assert behind.positions == list(range(1, head + 2))


def test_events_are_what_reading_gives(store: EventStore) -> None:
    got: list[Recorded] = []
    seen = threading.Event()
    store.subscribe(lambda events: (got.extend(events), len(got) == 3 and seen.set()))  # type: ignore[func-returns-value]
    (asked,) = store.append(log.add_lora())
    store.append(log.add_lora_completed(asked), log.forward_backward())
    assert seen.wait(PATIENCE_S)
    assert got == store.read()


def test_unsubscribed_is_not_called_and_a_failing_subscriber_harms_nobody(
    sqlite_store: EventStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = sqlite_store

    def broken(events: Sequence[Recorded]) -> None:
        raise RuntimeError("a bug")

    gone, healthy = Reader(), Reader()
    unsubscribe = store.subscribe(gone)
    store.subscribe(broken)
    store.subscribe(healthy)
    unsubscribe()
    unsubscribe()
    store.append(log.add_lora())
    store.append(log.optim_step())
    healthy.wait_for(2)
    assert healthy.positions == [1, 2] and gone.positions == []
    assert "a bug" in caplog.text


def test_local_commits_are_handed_over_at_once(sqlite_store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the next look at the database, which would be long after this test."""
    monkeypatch.setattr(tail, "POLL_S", 10 * PATIENCE_S)
    store = sqlite_store
    store.append(log.add_lora())
    reader = Reader()
    store.subscribe(reader)
    for _ in range(20):
        (recorded,) = store.append(log.optim_step())
        reader.wait_for(recorded.position)


def test_what_another_process_wrote_is_read_once_and_without_bodies(
    store: EventStore, database_settings: Settings
) -> None:
    readers = [Reader() for _ in range(3)]
    got: list[Recorded] = []
    store.subscribe(got.extend)
    for reader in readers:
        store.subscribe(reader)
    statements: list[str] = []
    sa.event.listen(
        store._read_engine, "before_cursor_execute", lambda _c, _k, statement, *_: statements.append(statement)
    )
    other = EventStore.open(database_settings)
    other.append(log.add_lora(), log.forward_backward())
    for reader in readers:
        reader.wait_for(2)
    pages = [statement for statement in statements if "FROM events" in statement]
    assert len(pages) == 1 and "events.body," not in pages[0]
    assert got[1].body is None and got[1].body_codec is not None
    assert store.body(got[1]) == other.body(other.read()[1]), "whoever wants a body asks for it"
    other.close()


def test_an_error_that_nobody_expected_ends_neither_the_tail_nor_the_writer(
    sqlite_store: EventStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, reader = sqlite_store, Reader()
    store.subscribe(reader)
    broken = iter([ZeroDivisionError("a bug of the tail"), None])
    serve = store._tail._serve

    def fail_once(subscriptions: Any) -> None:
        if (error := next(broken, None)) is not None:
            raise error
        serve(subscriptions)

    monkeypatch.setattr(store._tail, "_serve", fail_once)
    store.append(log.add_lora())
    reader.wait_for(1)
    assert "a bug of the tail" in caplog.text

    push = store._tail.push
    monkeypatch.setattr(store._writer, "_on_commit", lambda _: 1 / 0)
    with pytest.raises(Unavailable, match="may have been done"):
        store.append(log.optim_step())
    monkeypatch.setattr(store._writer, "_on_commit", push)
    assert "broke the writer" in caplog.text
    store.append(log.optim_step())
    reader.wait_for(3)
    assert store.failure() is None
    store.close()
    failed = store.failure()
    assert failed is not None and "writer thread" in failed.detail


def test_future_waiter(store: EventStore) -> None:
    (added,) = store.append(log.add_lora())
    store.append(log.add_lora_completed(added))
    first, second, third = store.append(log.forward_backward(), log.forward_backward(), log.forward_backward())

    async def scenario() -> None:
        waiter = FutureWaiter(store, in_thread)
        await waiter.start()
        found = await waiter.wait("alice", added.position, 5)
        assert found is not None and found[1] is None
        done, _ = found
        assert done.state == "completed" and done.result_position == 2
        assert await waiter.wait("alice", 999, 5) is None
        assert await waiter.wait("bob", added.position, 5) is None, "another tenant's future is no future"
        start = time.perf_counter()
        found = await waiter.wait("alice", first.position, 0.05)
        assert found is not None and (found[0].state, found[1]) == ("pending", None)
        assert time.perf_counter() - start > 0.04
        waits = [asyncio.create_task(waiter.wait("alice", first.position, PATIENCE_S)) for _ in range(3)]
        other = asyncio.create_task(waiter.wait("alice", second.position, PATIENCE_S))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(store.append, log.forward_backward_completed(first))
        woken = await asyncio.wait_for(asyncio.gather(*waits), AT_ONCE_S)
        for row, answer in filter(None, woken):
            assert row == store.queries.future("alice", first.position), "the row is the one the database has"
            assert answer is not None and answer.causation == first.position
        assert len(woken) == 3 and None not in woken
        assert not other.done()
        await asyncio.to_thread(store.append, log.failed(second))
        found = await asyncio.wait_for(other, AT_ONCE_S)
        assert found is not None and found[0].state == "failed"
        assert found[0] == store.queries.future("alice", second.position)
        last = asyncio.create_task(waiter.wait("alice", third.position, PATIENCE_S))
        await asyncio.sleep(0.05)
        await waiter.stop()
        found = await asyncio.wait_for(last, AT_ONCE_S)
        assert found is not None and found[0].state == "pending", "stop wakes who waits"
        found = await asyncio.wait_for(waiter.wait("alice", third.position, PATIENCE_S), AT_ONCE_S)
        assert found is not None and found[0].state == "pending"
        assert waiter._waiting == {}

    asyncio.run(scenario())


def test_answers_of_another_process_wake_waiters(store: EventStore, database_settings: Settings) -> None:
    (asked,) = store.append(log.add_lora())
    other = EventStore.open(database_settings)

    async def scenario() -> int | None:
        waiter = FutureWaiter(store, in_thread)
        await waiter.start()
        waiting = asyncio.create_task(waiter.wait("alice", asked.position, PATIENCE_S))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(other.append, log.add_lora_completed(asked))
        found = await asyncio.wait_for(waiting, AT_ONCE_S)
        await waiter.stop()
        return found[0].result_position if found else None

    assert asyncio.run(scenario()) == 2
    other.close()
