"""What cannot be read stops nobody: readers get it as `unreadable`, the check names it and goes on. On SQLite and
Postgres."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from tests.support import log
from tests.support.life import live
from tests.support.owner import as_owner
from tests.support.poison import poisoned
from tinkerbell.config import Settings
from tinkerbell.errors import Corrupt, KeyUnavailable, Unavailable
from tinkerbell.events import kinds
from tinkerbell.events import tables as t
from tinkerbell.events.futures import FutureWaiter
from tinkerbell.events.kinds import NewEvent, Recorded
from tinkerbell.events.store import EventStore
from tinkerbell.types import SamplingParams

BAD = kinds.SampleRequested(params=SamplingParams(stop=("",)), num_tokens=3)


def bad_sample(tenant: str = "alice") -> NewEvent:
    return msgspec.structs.replace(log.sample(None, tenant), event=BAD)


def test_a_poisoned_request_is_read_around_and_can_be_answered(store: EventStore, database_settings: Settings) -> None:
    live(store)
    with pytest.raises(Exception, match=r"params\.stop\[0\]"):
        store.append(bad_sample())
    with poisoned():
        (bad,) = store.append(bad_sample())
    (good,) = store.append(log.sample(None, "bob"))
    other = EventStore.open(database_settings)
    try:
        seen: list[Recorded] = []
        complete = threading.Event()

        def see(events: Sequence[Recorded]) -> None:
            seen.extend(events)
            if seen[-1].position >= good.position:
                complete.set()

        other.subscribe(see, after=0)
        assert complete.wait(20), "the tail did not come past it"
        assert [each.position for each in seen] == list(range(1, good.position + 1))
        read = other.get(bad.position)
        assert read is not None and isinstance(read.event, kinds.Unreadable) and "stop" in read.event.why
        assert kinds.type_of(read.event) == "sample.requested" and read.event.num_tokens == 3
        assert other.read(bad.position - 1, limit=2) == [read, good]
        report = other.check()
        assert [(each.position, each.type, each.what) for each in report.unreadable] == [
            (bad.position, "sample.requested", "event")
        ]
        other.append(log.result(kinds.SampleFailed(category="server", code="corrupt", message="no"), read))
        assert other.check().num_pending == report.num_pending - 1
    finally:
        other.close()


RESULTS = {type_ for type_, (event, _) in log.examples().items() if isinstance(event, kinds.Result)}


@pytest.mark.parametrize("type_", sorted(log.every_type() - RESULTS))
def test_an_event_of_a_newer_release_is_named_and_everything_else_is_compared(
    sqlite_store: EventStore, type_: str
) -> None:
    """Of every kind, in the middle of a story."""
    live(sqlite_store)
    event, body = log.examples()[type_]
    new = NewEvent(event=event, tenant="carol", stream="system/other", body=body)
    match event:
        case kinds.SampleRequested():
            new = msgspec.structs.replace(new, stream="tenant/carol")
        case kinds.AddLoraRequested() | kinds.CheckpointCopied() | kinds.CheckpointWritten():
            new = msgspec.structs.replace(new, stream="adapter/ad_new", adapter="ad_new")
        case kinds.Request():
            sqlite_store.append(log.add_lora("ad_new", "carol"))
            new = msgspec.structs.replace(new, stream="adapter/ad_new", adapter="ad_new")
        case kinds.LeaseGranted():
            new = msgspec.structs.replace(
                new, stream="system/other", event=kinds.LeaseGranted(resource="other", holder="x", epoch=1)
            )
        case _:
            pass
    with poisoned(version=9):
        (recorded,) = sqlite_store.append(new)
    report = sqlite_store.check()
    assert [(each.position, each.type) for each in report.unreadable] == [(recorded.position, type_)]
    read = sqlite_store.get(recorded.position)
    assert read is not None and isinstance(read.event, kinds.Unreadable) and "newer release" in read.event.why


@pytest.mark.parametrize(
    "answer",
    [
        log.sample_completed,
        lambda asked: log.failed(asked, cost_us=7),
    ],
)
def test_an_unreadable_answer_is_an_answer(store: EventStore, answer: Any) -> None:
    asked, other = store.append(log.sample(None, "alice"), log.sample(None, "bob"))
    made = answer(asked)
    charge = kinds.BatchRan(batch="b.1", busy_us=made.event.cost_us, charges=[(asked.position, made.event.cost_us)])
    store.append(log.system(charge))
    with poisoned(version=9):
        (recorded,) = store.append(made)
    store.append(log.sample_completed(other))
    report = store.check()
    assert report.num_results == 2 and report.num_pending == 0
    assert [each.position for each in report.unreadable] == [recorded.position]


def test_a_waiter_is_woken_by_an_answer_that_cannot_be_read(store: EventStore, database_settings: Settings) -> None:
    (asked,) = store.append(log.sample(None, "alice"))
    other = EventStore.open(database_settings)

    async def wait() -> None:
        waiter = FutureWaiter(other, lambda _tenant, call, *args: asyncio.to_thread(call, *args))
        await waiter.start()
        try:
            waiting = asyncio.create_task(waiter.wait("alice", asked.position, 20.0))
            await asyncio.sleep(0.05)
            with poisoned(version=9):
                await asyncio.to_thread(store.append, log.sample_completed(asked))
            assert await waiting is not None
            again = await waiter.wait("alice", asked.position, 0.0)
            assert again is not None and again[0].state == "completed"
        finally:
            await waiter.stop()

    try:
        asyncio.run(wait())
    finally:
        other.close()


def test_a_damaged_key_is_its_tenants_loss_and_its_bodies_are_named(
    store: EventStore, database_settings: Settings
) -> None:
    events = live(store)
    with as_owner(database_settings) as connection:
        wrapped = connection.execute(sa.select(t.data_keys.c.wrapped).where(t.data_keys.c.tenant == "alice")).scalar()
        assert wrapped is not None
        damaged = wrapped[:-1] + bytes([wrapped[-1] ^ 1])
        connection.execute(t.data_keys.update().where(t.data_keys.c.tenant == "alice").values(wrapped=damaged))
    other = EventStore.open(database_settings)
    try:
        other.require_keys()
        report = other.check()
        positions = [each.position for each in report.unreadable]
        mine = [each for each in events if each.tenant == "alice" and each.body_codec is not None]
        assert positions == [each.position for each in mine] and {each.what for each in report.unreadable} == {"body"}
        with pytest.raises(KeyUnavailable, match="alice"):
            other.body(mine[0])
        theirs = next(each for each in events if each.tenant != "alice" and each.body_codec is not None)
        assert other.body(theirs) is not None
    finally:
        other.close()


def test_what_the_operating_system_does_not_give_now_is_no_corruption(
    store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = live(store)
    saved = next(each for each in events if isinstance(each.event, kinds.SaveCompleted))
    digest = saved.blobs["weights"]
    for number in (24, 5, 12):  # EMFILE, EIO, ENOMEM

        def fails(_path: Any, number: int = number) -> bytes:
            raise OSError(number, "not now")

        with monkeypatch.context() as patched:
            patched.setattr("pathlib.Path.read_bytes", fails)
            with pytest.raises(Unavailable):
                store.blob(digest)
    assert store.blob(digest)
    store._blobs.path(digest).unlink()
    with pytest.raises(Corrupt, match="missing"):
        store.blob(digest)
