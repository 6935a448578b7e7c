"""Files that nothing names leave the blob store while others append, and no file that something names ever does. On
SQLite and Postgres."""

import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import msgspec
import pytest

from tests.support import log
from tinkerbell.config import Settings
from tinkerbell.errors import IdempotencyConflict, NotFound, StorageUnavailable, TinkerbellError
from tinkerbell.events import sweeping
from tinkerbell.events.blobs import BlobFile, BlobStore
from tinkerbell.events.kinds import NewEvent
from tinkerbell.events.storage import Counted
from tinkerbell.events.store import EventStore
from tinkerbell.types import Datum


def large() -> list[Datum]:
    """More than fits into a row, whatever a compressor does."""
    noise = os.urandom(80_000)
    return [Datum(tokens=noise, targets=noise, loss_inputs={})]


def files(settings: Settings) -> set[str]:
    return {path.name for path in settings.blob_dir.rglob("*") if path.is_file()}


def named(store: EventStore) -> set[str]:
    return {digest for event in store.read(0, limit=10_000) for digest in event.blobs.values()}


def made(store: EventStore) -> None:
    """An adapter that is ready."""
    (asked,) = store.append(log.add_lora())
    store.append(log.add_lora_completed(asked))


def asked(adapter: str = "ad_one", key: str | None = None, key_of: str | None = None) -> NewEvent:
    new = log.forward_backward(adapter, data=large(), key=key)
    return new if key_of is None else msgspec.structs.replace(new, request_hash=log.request_hash(key_of))


def test_a_refused_or_repeated_submit_leaves_no_file(store: EventStore, database_settings: Settings) -> None:
    """Each in its own way, so that a new way has to be added here; one by one, and many at once."""
    store.append(log.add_lora())
    (first,) = store.append(asked(key="again"))
    assert files(database_settings) == named(store) != set()

    def refused(new: NewEvent, error: type[TinkerbellError]) -> None:
        with pytest.raises(error):
            store.append(new)

    for _ in range(10):
        refused(asked("ad_nobody"), NotFound)
    refused(asked(key="again", key_of="another"), IdempotencyConflict)
    refused(msgspec.structs.replace(asked(), expected_seq=77), TinkerbellError)
    refused(msgspec.structs.replace(asked(), fence=("scheduler", 9)), TinkerbellError)
    refused(msgspec.structs.replace(asked(), session="se_nobody"), TinkerbellError)
    assert [store.append(asked(key="again"))[0].position for _ in range(5)] == [first.position] * 5
    # All or none: the second is refused, so the first one's file goes too.
    with pytest.raises(NotFound):
        store.append(asked(), asked("ad_nobody"))
    together: list[Future[list[object]]] = [store.submit(asked(key="at once")) for _ in range(8)]  # type: ignore[misc]
    assert len({future.result()[0].position for future in together}) == 1  # type: ignore[attr-defined]
    store.append()
    store.append(log.forward_backward())  # behind whatever the writer still cleans up
    assert files(database_settings) == named(store)
    store.check()


def test_a_submit_that_fails_half_way_leaves_no_file(
    store: EventStore, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store takes its first blobs and not the last."""
    made(store)
    (saving,) = store.append(log.save())
    add, left = BlobStore.add, iter([True, True, False])

    def fills(self: BlobStore, data: bytes) -> tuple[bytes, BlobFile | None]:
        if not next(left):
            raise OSError(28, "No space left on device")
        return add(self, data)

    monkeypatch.setattr(BlobStore, "add", fills)
    with pytest.raises(StorageUnavailable):
        store.append(log.save_completed(saving))
    monkeypatch.undo()
    assert files(database_settings) == set()
    store.append(log.save_completed(saving))
    store.check()


def test_what_a_dead_writer_left_goes_with_the_sweep_and_nothing_else_does(
    store: EventStore, database_settings: Settings
) -> None:
    made(store)
    (saving,) = store.append(log.save())
    store.append(log.save_completed(saving))
    store.append(asked())
    blobs = BlobStore(database_settings.blob_dir)
    orphan = blobs.put(os.urandom(100)).hex()
    half = blobs.path(orphan).parent / "tmp-half"
    half.write_bytes(b"half")
    foreign = blobs.path(orphan).parent / "README"
    foreign.write_bytes(b"somebody's own")
    assert store.sweeper.sweep(3600) == sweeping.Swept(), "not before its time"
    report = store.storage()
    assert (report.orphans, report.halves) == (Counted(number=1, num_bytes=100), Counted(number=1, num_bytes=4))
    assert (report.needed.number, report.there.number, report.missing) == (4, 5, Counted())
    assert {what: each.number for what, each in report.tenants["alice"].items()} == {"saves": 3, "bodies": 1}
    assert (store.check().num_orphans, store.check().orphan_bytes) == (1, 100)
    assert store.sweeper.sweep(-1) == sweeping.Swept(num_files=2, num_bytes=104)
    assert files(database_settings) == named(store) | {"README"}
    assert store.sweeper.sweep(-1) == sweeping.Swept()
    assert store.check().num_orphans == 0
    lost = blobs.path(min(named(store)))
    lost.rename(database_settings.blob_dir / "away")
    report = store.storage()
    assert report.missing.number == 1 and report.missing_digests == [lost.name]


def test_an_append_whose_file_was_swept_is_refused_and_one_that_is_needed_stays(
    store: EventStore, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep comes between the file and its event, at every place there is: what is recorded can be read."""
    store.append(log.add_lora())
    add = BlobStore.add

    def swept_at_once(self: BlobStore, data: bytes) -> tuple[bytes, BlobFile | None]:
        found = add(self, data)
        store.sweeper.sweep(-1)
        return found

    monkeypatch.setattr(BlobStore, "add", swept_at_once)
    with pytest.raises(StorageUnavailable, match="ask again"):
        store.append(asked(key="k"))
    monkeypatch.undo()
    (recorded,) = store.append(asked(key="k"))
    store.sweeper.sweep(-1)
    assert store.body(recorded) is not None
    store.check()


def test_a_file_that_is_to_be_written_again_is_as_good_as_new(
    database_settings: Settings, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without encryption the same bytes are the same file: one seen as old may be needed by now."""
    plain = EventStore.open(msgspec.structs.replace(database_settings, encryption="off"))
    try:
        made(plain)
        blobs = BlobStore(database_settings.blob_dir)
        (saving,) = plain.append(log.save())
        saved = log.save_completed(saving, b"weights" * 10)
        old = blobs.path(blobs.put(saved.blobs["weights"]).hex())
        os.utime(old, ns=(0, 0))
        seen = blobs.find(old.name)
        assert seen is not None
        plain.append(saved)
        assert plain.sweeper.remove([seen]) == sweeping.Swept()
        orphan = blobs.path(blobs.put(b"orphan").hex())
        os.utime(orphan, ns=(0, 0))
        (before,) = [file for file in map(blobs.find, [orphan.name]) if file is not None]
        blobs.put(b"orphan")
        assert plain.sweeper.remove([before]) == sweeping.Swept() and orphan.exists()
        plain.check()
    finally:
        plain.close()


WRITER = """
import itertools, os, sys, threading
import msgspec
from tests.support import log
from tinkerbell.config import Settings
from tinkerbell.errors import StorageUnavailable
from tinkerbell.events.store import EventStore
from tinkerbell.types import Datum

store = EventStore.open(msgspec.json.decode(sys.argv[1], type=Settings))
said = threading.Lock()

def run(name):
    store.append(log.add_lora(name))
    for number in itertools.count():
        noise = os.urandom(80_000)
        try:
            data = [Datum(noise, noise, {})]
            (recorded,) = store.append(log.forward_backward(name, data=data, key=f"{name}-{number}"))
        except StorageUnavailable:
            continue
        with said:
            print(recorded.position, recorded.blobs["body"], flush=True)

for n in range(2):
    threading.Thread(target=run, args=(f"ad_{sys.argv[2]}_{n}",)).start()
"""


def test_sweeps_race_with_writers_that_are_killed(store: EventStore, database_settings: Settings) -> None:
    """Two processes append large bodies, one sweeps without any grace; each writer is killed in the middle. What was
    acknowledged is there, and in the end nothing else."""
    encoded = msgspec.json.encode(database_settings).decode()
    over = threading.Event()
    swept: list[sweeping.Swept] = []

    def sweep() -> None:
        while not over.is_set():
            swept.append(store.sweeper.sweep(-1))

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    acknowledged: dict[int, str] = {}
    try:
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, encoded, str(life)],
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
            )
            for life in range(2)
        ]
        for writer, words in zip(writers, (12, 20), strict=True):
            assert writer.stdout is not None
            for line in itertools.islice(writer.stdout, words):
                position, digest = line.split()
                acknowledged[int(position)] = digest
        for writer in writers:
            writer.kill()
            writer.communicate()
    finally:
        over.set()
        sweeper.join()
    store.sweeper.sweep(-1)
    assert len(acknowledged) == 32
    for position, digest in acknowledged.items():
        recorded = store.get(position)
        assert recorded is not None and recorded.blobs["body"] == digest
        assert store.body(recorded) is not None
    assert files(database_settings) == named(store)
    store.check()
