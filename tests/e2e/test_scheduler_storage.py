"""A scheduler whose blob store takes nothing for a while: nobody loses a leadership, and what waits is written then."""

import threading
from collections.abc import Iterator

import msgspec
import pytest
from prometheus_client import REGISTRY

from tests.support.runs import Asker, data, eventually, run_settings, serving
from tinkerbell.config import Settings
from tinkerbell.events import kinds
from tinkerbell.events.blobs import BlobFile, BlobStore
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler import checkpoints
from tinkerbell.types import AdamParams, LoraConfig


class Volume:
    """Where the scheduler's blobs go."""

    def __init__(self) -> None:
        self.takes = threading.Event()
        self.num_refused = 0


@pytest.fixture
def volume(monkeypatch: pytest.MonkeyPatch) -> Iterator[Volume]:
    """Takes nothing until told."""
    found, add = Volume(), BlobStore.add

    def refuse(self: BlobStore, stored: bytes) -> tuple[bytes, BlobFile | None]:
        if threading.current_thread().name.startswith("scheduler-") and not found.takes.is_set():
            found.num_refused += 1
            raise OSError(28, "No space left on device")
        return add(self, stored)

    monkeypatch.setattr(BlobStore, "add", refuse)
    monkeypatch.setattr(checkpoints, "FIRST_PAUSE_S", 0.05)
    yield found
    found.takes.set()


def leaderships(store: EventStore) -> int:
    return len(store.read(0, types=["lease.granted"]))


def counted(outcome: str) -> float:
    return REGISTRY.get_sample_value("tinkerbell_recovery_points_total", {"outcome": outcome}) or 0.0


def test_a_blob_store_that_takes_nothing_ends_no_leadership_and_holds_up_nobody_else(
    store: EventStore, database_settings: Settings, volume: Volume
) -> None:
    failed, written = counted("failed"), counted("written")
    settings = msgspec.structs.replace(run_settings(database_settings), checkpoint_every_steps=2)
    with serving(store, settings) as service:
        trains, saves = Asker(store, "ad_trains", "alice"), Asker(store, "ad_saves", "bob")
        for asker in (trains, saves):
            asker.add_lora()
        saved = saves.ask(kinds.SaveRequested(checkpoint="ck_waits"))
        after = saves.ask(kinds.OptimStepRequested(adam=AdamParams()))
        for step in range(12):
            trains.train(data(step))
            trains.step()
        trains.wait()
        # An adapter that is made now needs no more than the log: nothing waits for what the volume does not take.
        late = Asker(store, "ad_late", "carol")
        late.ask(kinds.AddLoraRequested(base_model="fake", lora=LoraConfig(rank=1), seed=3))
        late.wait()
        assert volume.num_refused > 0 and counted("failed") > failed and counted("written") == written
        assert store.read(0, types=["checkpoint.written", "save.completed", "save.failed"]) == []
        assert store.queries.future("bob", after).state == "pending", "what follows a save does not overtake it"
        assert leaderships(store) == 1 and service.leading

        volume.takes.set()
        assert [type(each.event).__name__ for each in saves.wait()] == [
            "AddLoraCompleted",
            "SaveCompleted",
            "OptimStepFailed",
        ]
        assert store.queries.future("bob", saved).state == "completed"
        eventually(lambda: store.read(0, types=["checkpoint.written"]) != [])
        assert counted("written") > written and leaderships(store) == 1
    store.check()


def test_an_adapter_that_cannot_be_saved_is_not_evicted(
    store: EventStore, database_settings: Settings, volume: Volume
) -> None:
    changes = {"idle_adapter_s": 0.05, "checkpoint_every_steps": 1000}
    with serving(store, msgspec.structs.replace(run_settings(database_settings), **changes)) as service:
        asker = Asker(store, "ad_idle", "alice")
        asker.add_lora()
        asker.train(data(1))
        asker.step()
        asker.wait()
        eventually(lambda: volume.num_refused > 1)
        assert service._leader is not None and "ad_idle" in service._leader._residency
        volume.takes.set()
        eventually(lambda: service._leader is not None and "ad_idle" not in service._leader._residency)
        (point,) = store.read(0, types=["checkpoint.written"])
        assert isinstance(point.event, kinds.CheckpointWritten) and point.event.step == 1
        assert leaderships(store) == 1


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_body_that_is_too_large_for_its_row_waits_and_holds_up_nobody_else(
    store: EventStore, database_settings: Settings, volume: Volume
) -> None:
    """One of the other kind: the result of a forward, which the executor has long computed."""
    settings = msgspec.structs.replace(run_settings(database_settings), batch_tokens=8192)
    with serving(store, settings):
        large, small = Asker(store, "ad_large", "alice"), Asker(store, "ad_small", "bob")
        large.add_lora()
        position = large.train(data(1, (900,) * 24))
        small.add_lora()
        eventually(lambda: volume.num_refused > 0)
        for step in range(3):
            small.train(data(step))
            small.step()
        small.wait()
        assert store.queries.future("alice", position).state == "pending"
        assert leaderships(store) == 1
        volume.takes.set()
        large.step()
        assert type(large.wait()[-1].event).__name__ == "OptimStepCompleted"
        assert leaderships(store) == 1
