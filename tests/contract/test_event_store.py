"""What every event store promises: order, idempotency, sequence, fencing, all-or-nothing. On SQLite and Postgres."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from tests.support import log
from tests.support.waiting import PATIENCE_S
from tinkerbell.config import Settings
from tinkerbell.errors import (
    AlreadyAnswered,
    Conflict,
    Fenced,
    Gone,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    SequenceConflict,
    Unavailable,
)
from tinkerbell.events import kinds
from tinkerbell.events.kinds import NewEvent, Recorded
from tinkerbell.events.statements import Statements
from tinkerbell.events.store import EventStore
from tinkerbell.events.writer import Writer
from tinkerbell.types import LossSpec


def one(store: EventStore, new: NewEvent) -> Recorded:
    (recorded,) = store.append(new)
    return recorded


def ready(store: EventStore, adapter: str = "ad_one", tenant: str = "alice") -> Recorded:
    """An adapter that was made."""
    asked = one(store, log.add_lora(adapter, tenant))
    return one(store, log.add_lora_completed(asked))


def test_positions_are_1_2_3_and_reads_give_what_was_appended(store: EventStore) -> None:
    assert store.head() == 0
    first = store.append(log.add_lora(), log.forward_backward(), log.optim_step())
    second = store.append(log.add_lora("ad_two", "bob"), log.sample(None, "bob"))
    recorded = first + second
    assert [item.position for item in recorded] == [1, 2, 3, 4, 5]
    assert [item.seq for item in recorded] == [0, 1, 2, 0, None]
    assert [item.stream_version for item in recorded] == [0, 1, 2, 0, 0]
    assert store.read() == recorded
    assert [store.get(item.position) for item in recorded] == recorded
    assert store.get(6) is None
    assert store.head() == 5
    assert store.read(1, limit=2) == recorded[1:3]
    assert store.read(tenant="bob") == second
    assert store.read(adapter="ad_one", types={"optim_step.requested"}) == [recorded[2]]
    assert store.check().num_events == 5


def test_bodies_come_back_inline_and_as_blobs(store: EventStore) -> None:
    ready(store)
    small = one(store, log.forward_backward(data=[log.datum(4)]))
    noise = [log.Datum(tokens=bytes(range(256)) * 300, targets=b"", loss_inputs={}) for _ in range(2)]
    large_data = [log.Datum(tokens=os.urandom(80_000), targets=b"", loss_inputs={})]
    large = one(store, log.forward_backward(data=large_data))
    shrinks = one(store, log.forward_backward(data=noise))
    assert small.body is not None and small.blobs == {}
    assert large.body is None and set(large.blobs) == {"body"}
    assert shrinks.body is not None and shrinks.body_codec == "zstd+aes256gcm" and len(shrinks.body) < 64 * 1024
    assert store.body(small) == kinds.ForwardBackwardBody(data=[log.datum(4)])
    assert store.body(large) == kinds.ForwardBackwardBody(data=large_data)
    assert store.body(shrinks) == kinds.ForwardBackwardBody(data=noise)
    assert store.body(one(store, log.optim_step())) is None
    assert store.check().num_blobs == 1


def test_named_blobs_are_kept_once_by_content(database_settings: Settings) -> None:
    """Where they are not encrypted; then equal ones differ."""
    with closing(EventStore.open(msgspec.structs.replace(database_settings, encryption="off"))) as store:
        ready(store)
        first, second = store.append(log.save(), log.save(checkpoint="ck_two"))
        done = [one(store, log.save_completed(asked, b"w" * 5000)) for asked in (first, second)]
        assert done[0].blobs == done[1].blobs
        assert store.blob(done[0].blobs["weights"]) == b"w" * 5000
        report = store.check()
        assert (report.num_blobs, report.blob_bytes) == (3, 5000 + 2 + 5007)
        row = store.queries.checkpoint("alice", "ck_one")
        assert row is not None and row.blobs == done[0].blobs and row.after_seq == 1


def test_a_copy_shares_the_blobs_of_its_source(store: EventStore) -> None:
    """Nothing is asked of its run, whose id must be free."""
    ready(store)
    saved = one(store, log.save_completed(one(store, log.save())))
    copied = one(store, log.copied(saved))
    assert copied.blobs == saved.blobs and store.check().num_blobs == 3
    source, copy = (store.queries.checkpoint("alice", id_) for id_ in ("ck_one", "ck_copy"))
    assert source is not None and copy is not None and copy.blobs == source.blobs and copy.lora == source.lora
    run = store.queries.adapter("alice", "ad_copy")
    assert run is not None and (run.state, run.checkpoint, run.step) == ("removed", "ck_one", copy.step)
    for refused in (log.copied(saved), log.copied(saved, adapter="ad_one"), log.add_lora("ad_copy")):
        with pytest.raises(Conflict):
            store.append(refused)
    for asked in (log.optim_step("ad_copy"), log.sample("ad_copy"), log.remove_lora("ad_copy")):
        with pytest.raises(NotFound):
            store.append(asked)
    missing = msgspec.structs.replace(log.copied(saved, adapter="ad_new"), shared={"weights": "00" * 32})
    with pytest.raises(Gone, match="weights"):
        store.append(missing)
    assert store.check().num_blobs == 3


def test_the_same_idempotency_key_gives_the_first_event(store: EventStore) -> None:
    first = one(store, log.add_lora(key="a"))
    again = one(store, log.add_lora("ad_other", key="a"))
    assert again == first
    assert one(store, log.add_lora("ad_bobs", "bob", key="a")).position == 2, "keys are each tenant's own"
    with pytest.raises(IdempotencyConflict):
        store.append(log.request(log.add_lora().event, "ad_other", key="a", key_of="something else"))
    # Within one submit, and together with something new.
    both = store.append(
        log.forward_backward(key="b"), log.forward_backward(key="b"), log.add_lora(key="a"), log.optim_step()
    )
    assert [item.position for item in both] == [3, 3, 1, 4]
    assert store.check().num_events == 4


def test_a_retry_is_the_first_event_even_after_its_adapter_is_gone(store: EventStore) -> None:
    ready(store)
    first = one(store, log.forward_backward(key="k", expected_seq=1))
    one(store, log.failed(first))
    gone = one(store, log.remove_lora())
    one(store, log.result(kinds.RemoveLoraCompleted(), gone))
    assert one(store, log.forward_backward(key="k", expected_seq=1)) == first


def test_expected_seq(store: EventStore) -> None:
    ready(store)
    assert one(store, log.forward_backward(expected_seq=1)).seq == 1
    with pytest.raises(SequenceConflict) as caught:
        store.append(log.forward_backward(expected_seq=1))
    assert caught.value.extra == {"next_seq": 2}
    assert one(store, log.sample()).seq is None
    assert one(store, log.optim_step()).seq == 2


def test_adapters_that_do_not_exist_or_are_anothers_or_gone_are_told_apart_by_nobody(store: EventStore) -> None:
    ready(store)
    ready(store, "ad_gone")
    gone = one(store, log.remove_lora("ad_gone"))
    assert one(store, log.forward_backward("ad_gone")).seq == 2, "it lives until its removal is answered"
    one(store, log.result(kinds.RemoveLoraCompleted(), gone))
    failed = one(store, log.add_lora("ad_failed"))
    one(store, log.failed(failed))
    texts = set()
    for new in (
        log.forward_backward("ad_unknown"),
        log.forward_backward("ad_one", "bob"),
        log.sample("ad_one", "bob"),
        log.forward_backward("ad_gone"),
        log.sample("ad_failed"),
    ):
        with pytest.raises(NotFound) as caught:
            store.append(new)
        texts.add(caught.value.detail)
    assert len(texts) == 1
    with pytest.raises(Conflict):
        store.append(log.add_lora("ad_one", "bob"))


def test_results_come_in_the_order_of_their_requests_and_once(store: EventStore) -> None:
    added = one(store, log.add_lora())
    first, second = store.append(log.forward_backward(), log.forward_backward())
    with pytest.raises(AlreadyAnswered):
        store.append(log.forward_backward_completed(first))
    # All in one submit is in order as well.
    store.append(log.add_lora_completed(added), log.forward_backward_completed(first))
    with pytest.raises(AlreadyAnswered):
        store.append(log.forward_backward_completed(first))
    with pytest.raises(AlreadyAnswered):
        store.append(log.failed(first))
    with pytest.raises(AlreadyAnswered):
        store.append(log.forward_backward_completed(second), log.failed(second))
    one(store, log.failed(second))
    assert store.check().num_results == 3


def test_samples_are_answered_in_any_order(store: EventStore) -> None:
    ready(store)
    samples = store.append(log.sample(), log.forward_backward(), log.sample())
    one(store, log.sample_completed(samples[2]))
    one(store, log.sample_completed(samples[0]))
    one(store, log.forward_backward_completed(samples[1]))
    store.check()


def test_a_result_must_answer_a_request_of_its_tenant_adapter_and_kind(store: EventStore) -> None:
    ready(store)
    asked = one(store, log.forward_backward())
    right = log.forward_backward_completed(asked)
    for wrong in (
        msgspec.structs.replace(right, causation=999),
        msgspec.structs.replace(right, causation=None),
        msgspec.structs.replace(right, tenant="bob"),
        msgspec.structs.replace(right, adapter=None),
        log.result(kinds.OptimStepCompleted(step=1, grad_norm=0.0, state_digest=""), asked),
    ):
        with pytest.raises(NotFound):
            store.append(wrong)
    one(store, right)


def test_a_fenced_event_needs_the_epoch_of_now(store: EventStore) -> None:
    ready(store)
    asked = one(store, log.forward_backward())
    new = log.forward_backward_completed(asked)
    with pytest.raises(Fenced):
        store.append(msgspec.structs.replace(new, fence=("scheduler", 1)))
    lease = store.acquire_lease("scheduler", "one", 30)
    assert lease is not None and lease.epoch == 1
    before = store.head()
    store.release_lease(lease)
    later = store.acquire_lease("scheduler", "two", 30)
    assert later is not None and later.epoch == 2
    with pytest.raises(Fenced):
        store.append(msgspec.structs.replace(new, fence=("scheduler", 1)))
    assert store.head() == before + 1, "what is refused changes nothing"
    assert store.queries.pending() != []
    one(store, msgspec.structs.replace(new, fence=("scheduler", 2)))
    with pytest.raises(Fenced):
        store.append(log.system(kinds.LeaseGranted(resource="scheduler", holder="three", epoch=2)))
    store.check()


def test_leases(store: EventStore) -> None:
    lease = store.acquire_lease("scheduler", "one", 30)
    assert lease is not None
    assert store.acquire_lease("scheduler", "two", 30) is None
    assert store.acquire_lease("scheduler", "one", 30) is None, "a second process of the same name is a second process"
    assert store.renew_lease(lease, 0.05)
    events = store.head()
    threading.Event().wait(0.1)
    assert store.renew_lease(lease, 0.05), "run out, but nobody took it"
    assert store.head() == events, "heartbeats are no events"
    threading.Event().wait(0.1)
    taken = store.acquire_lease("scheduler", "two", 30)
    assert taken is not None and taken.epoch == 2
    assert not store.renew_lease(lease, 30)
    store.release_lease(lease)
    assert store.acquire_lease("scheduler", "one", 30) is None
    store.release_lease(taken)
    again = store.acquire_lease("scheduler", "one", 30)
    assert again is not None and again.epoch == 3
    other = store.acquire_lease("something else", "one", 30)
    assert other is not None and other.epoch == 1
    granted = store.read(types={"lease.granted"})
    assert [item.event.epoch for item in granted if isinstance(item.event, kinds.LeaseGranted)] == [1, 2, 3, 1]
    store.check()


def test_one_of_many_takes_a_lease(store: EventStore) -> None:
    threads, taken = [], []
    for number in range(12):
        thread = threading.Thread(target=lambda n=number: taken.append(store.acquire_lease("scheduler", f"h{n}", 30)))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    assert len([lease for lease in taken if lease is not None]) == 1
    assert store.head() == 1


def test_a_submit_is_all_or_nothing(store: EventStore) -> None:
    ready(store)
    before = store.head()
    with pytest.raises(NotFound):
        store.append(log.forward_backward(), log.add_lora("ad_new"), log.forward_backward("ad_unknown"))
    assert store.head() == before
    assert store.queries.adapter("alice", "ad_new") is None
    assert one(store, log.forward_backward()).seq == 1
    store.check()


def test_refused_submits_leave_the_others_of_their_group_untouched(store: EventStore) -> None:
    ready(store)
    before = store.head()
    futures: list[tuple[bool, Future[list[Recorded]]]] = []
    for number in range(60):
        bad = number % 3 == 0
        news = (log.forward_backward(), log.forward_backward("ad_unknown" if bad else "ad_one"))
        futures.append((bad, store.submit(*news)))
    positions = []
    for bad, future in futures:
        if bad:
            assert isinstance(future.exception(), NotFound)
        else:
            recorded = future.result()
            assert recorded[1].position == recorded[0].position + 1
            positions += [item.position for item in recorded]
    assert positions == list(range(before + 1, before + 81))
    store.check()


def test_an_error_of_the_database_in_one_submit_is_not_the_others(
    store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(store)
    original = Statements.insert

    def poisoned(self: Statements, table: sa.Table, rows: Sequence[Any], *more: Any) -> None:
        if any(row.get("adapter") == "ad_poison" for row in rows):
            raise store._write_engine.dialect.loaded_dbapi.DataError("it does not fit")
        original(self, table, rows, *more)

    monkeypatch.setattr(Statements, "insert", poisoned)
    futures = [store.submit(log.add_lora("ad_poison" if n == 5 else f"ad_{n}")) for n in range(10)]
    for number, future in enumerate(futures):
        if number == 5:
            assert isinstance(future.exception(), InvalidRequest)
        else:
            assert len(future.result()) == 1
    monkeypatch.undo()
    assert len(store.queries.adapters("alice")) == 10
    store.check()


def test_a_commit_that_fails_after_it_happened_is_not_done_twice(
    store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(store)
    one(store, log.sample(None))  # the tenant has its key by now
    original = sa.RootTransaction.commit
    broken = threading.Event()

    def commit(self: sa.RootTransaction) -> None:
        original(self)
        if not broken.is_set():
            broken.set()
            raise sa.exc.OperationalError("COMMIT", {}, ConnectionError("the connection is gone"))

    monkeypatch.setattr(sa.RootTransaction, "commit", commit)
    recorded = one(store, log.forward_backward())
    assert broken.is_set()
    assert store.read(recorded.position - 1) == [recorded]
    assert store.check().num_requests == 3


def test_a_commit_that_nobody_knows_of_is_never_made_again(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is away between the commit and the question what became of it."""
    ready(store)
    commit, is_durable = sa.RootTransaction.commit, Writer._is_durable
    before = store.head()

    def commit_and_lose(self: sa.RootTransaction) -> None:
        commit(self)
        raise sa.exc.OperationalError("COMMIT", {}, ConnectionError("the connection is gone"))

    def still_away(*_: object) -> bool:
        monkeypatch.setattr(sa.RootTransaction, "commit", commit)
        monkeypatch.setattr(Writer, "_is_durable", is_durable)
        raise sa.exc.OperationalError("SELECT", {}, ConnectionError("it restarts"))

    hold_the_writer = store.submit(log.forward_backward())
    monkeypatch.setattr(sa.RootTransaction, "commit", commit_and_lose)
    monkeypatch.setattr(Writer, "_is_durable", still_away)
    futures = [hold_the_writer, *(store.submit(log.forward_backward()) for _ in range(20))]
    failed = [future.exception() for future in futures]
    unknown = [exc for exc in failed if exc is not None]
    assert unknown and all(isinstance(exc, Unavailable) for exc in unknown)
    assert store.head() == before + len(futures), "each of them once, whatever its submitter was told"
    store.check()


def test_a_commit_that_did_not_happen_is_an_error(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ready(store)
    original = sa.RootTransaction.commit
    before = store.head()

    def commit(self: sa.RootTransaction) -> None:
        if self.connection.engine is store._write_engine and not broken.is_set():
            broken.set()
            raise sa.exc.OperationalError("COMMIT", {}, ConnectionError("the disk is full"))
        original(self)

    broken = threading.Event()
    monkeypatch.setattr(sa.RootTransaction, "commit", commit)
    with pytest.raises(Unavailable):
        store.append(log.forward_backward())
    monkeypatch.undo()
    assert store.head() == before
    assert one(store, log.forward_backward()).position == before + 1
    store.check()


def test_what_the_databases_cannot_hold_is_refused_alike(store: EventStore) -> None:
    ready(store)
    asked = one(store, log.forward_backward())
    bad_name = kinds.ForwardBackwardRequested(loss=LossSpec(name="a\0b"), num_datums=1, num_tokens=3)
    body = kinds.ForwardBackwardBody(data=[log.datum()])
    for new in (
        log.request(bad_name, body=body),
        log.forward_backward(key="a\0b"),
        log.forward_backward_completed(asked, loss=float("nan")),
        log.forward_backward_completed(asked, loss=float("inf")),
    ):
        with pytest.raises(InvalidRequest):
            store.append(new)
    with pytest.raises(TypeError):
        store.append(log.request(log.forward_backward().event, body=None))
    with pytest.raises(TypeError):
        store.append(log.request(kinds.OptimStepRequested(adam=log.AdamParams()), body=body))
    odd = log.request(
        kinds.SaveRequested(checkpoint="ck_\u4e16\u754c \U0001f600 ' \" \\ %s :x"), key="\u00e9 \U0001f600"
    )
    assert store.read(one(store, odd).position - 1)[0].event == odd.event
    store.check()


def test_a_closed_store_refuses(database_settings: Settings) -> None:
    store = EventStore.open(database_settings)
    waiting = [store.submit(log.add_lora(f"ad_{n}")) for n in range(20)]
    store.close()
    assert sorted(future.result()[0].position for future in waiting) == list(range(1, 21)), "what was taken is written"
    with pytest.raises(Unavailable):
        store.append(log.add_lora())
    assert store.submit().result() == []


def test_many_threads_and_group_commit(database_settings: Settings) -> None:
    store = EventStore.open(database_settings)
    seen: list[int] = []
    caught_up = threading.Event()

    def see(events: object) -> None:
        seen.extend(item.position for item in events)  # type: ignore[attr-defined]
        if seen[-1] == 8 * 25:
            caught_up.set()

    store.subscribe(see)

    def run(name: str) -> None:
        asked = [one(store, log.add_lora(name))] + [one(store, log.forward_backward(name)) for _ in range(24)]
        assert [item.seq for item in asked] == list(range(25))

    threads = [threading.Thread(target=run, args=(f"ad_{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert caught_up.wait(PATIENCE_S)
    assert seen == list(range(1, 8 * 25 + 1))
    assert store.check().num_pending == 200
    store.close()
