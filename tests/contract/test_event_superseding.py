"""Recovery points that newer ones replaced leave the disk while others append. On SQLite and Postgres."""

import os
from collections.abc import Callable

import pytest

from tests.support import log
from tinkerbell.config import Settings
from tinkerbell.errors import Compacted, Fenced
from tinkerbell.events import kinds
from tinkerbell.events.blobs import BlobFile, BlobStore
from tinkerbell.events.kinds import NewEvent, Recorded
from tinkerbell.events.leases import Lease
from tinkerbell.events.rows import RecoveryPointRow
from tinkerbell.events.store import EventStore
from tinkerbell.events.sweeping import Swept
from tinkerbell.scheduler.recovery import find_marks
from tinkerbell.scheduler.superseding import Superseding, superseded
from tinkerbell.types import LoraConfig


def row(adapter: str, after_seq: int, state: str = "ready", position: int = 0) -> RecoveryPointRow:
    values = {"id": f"ck_{adapter}_{after_seq}", "tenant": "t", "adapter": adapter, "adapter_state": state}
    return RecoveryPointRow(**values, after_seq=after_seq, position=position or after_seq, blobs={})  # type: ignore[arg-type]


def test_the_newest_are_kept_of_each_adapter_that_lives() -> None:
    points = [row("a", 1), row("b", 5), row("a", 9), row("a", 4), row("gone", 7, "removed"), row("b", 2)]
    assert superseded(points, 2) == [row("a", 1), row("gone", 7, "removed")]
    assert superseded(points, 1) == [row("a", 4), row("a", 1), row("b", 2), row("gone", 7, "removed")]
    assert superseded([], 1) == []


def files(settings: Settings) -> set[str]:
    return {path.name for path in settings.blob_dir.rglob("*") if path.is_file()}


def train(store: EventStore, adapter: str, num_points: int, tenant: str = "alice") -> list[Recorded]:
    """An adapter with a recovery point after each step."""
    (made,) = store.append(log.add_lora(adapter, tenant))
    store.append(log.add_lora_completed(made))
    points = []
    for step in range(1, num_points + 1):
        (asked,) = store.append(log.optim_step(adapter, tenant))
        store.append(log.optim_step_completed(asked, step))
        assert asked.seq is not None
        event = kinds.CheckpointWritten(
            checkpoint=f"ck_{adapter}_{step}", after_seq=asked.seq, step=step, lora=LoraConfig(rank=4), num_bytes=1,
            state_digest=f"d{step}",
        )  # fmt: skip
        blobs = {name: os.urandom(300) for name in ("weights", "adapter_config", "optimizer")}
        new = NewEvent(
            event=event, tenant=tenant, stream=f"adapter/{adapter}", adapter=adapter, blobs=blobs,
            causation=asked.position,
        )  # fmt: skip
        points += store.append(new)
    return points


@pytest.fixture
def lease(store: EventStore) -> Lease:
    found = store.acquire_lease("scheduler", "leader", 60)
    assert found is not None
    return found


@pytest.fixture
def supersede(store: EventStore, lease: Lease) -> Callable[[], None]:
    return lambda: Superseding(store, lease, 2, 1.0).do(1.0)


def test_superseded_points_leave_the_disk_and_the_log_says_so(
    store: EventStore, database_settings: Settings, supersede: Callable[[], None]
) -> None:
    points = train(store, "ad_one", 5)
    others = train(store, "ad_two", 2, "bob")
    removed = train(store, "ad_three", 1)
    (leaves,) = store.append(log.request(kinds.RemoveLoraRequested(), "ad_three"))
    store.append(log.result(kinds.RemoveLoraCompleted(), leaves))
    supersede()
    kept = {digest for point in [*points[3:], *others] for digest in point.blobs.values()}
    assert files(database_settings) == kept
    (said,) = store.read(0, types=["bulk.compacted"])
    assert isinstance(said.event, kinds.BulkCompacted) and said.tenant == "alice"
    going = [*points[:3], *removed]
    assert sorted(said.event.positions) == sorted(point.position for point in going)
    assert sorted(said.event.checkpoints) == ["ck_ad_one_1", "ck_ad_one_2", "ck_ad_one_3", "ck_ad_three_1"]
    assert said.event.num_blobs == 12 and said.event.num_bytes > 12 * 300
    with pytest.raises(Compacted, match="superseded"):
        store.blob(points[0].blobs["weights"])
    assert find_marks(store, "ad_one").origin.position == points[-1].position
    assert {point.id for point in store.queries.recovery_points()} == {
        "ck_ad_one_4", "ck_ad_one_5", "ck_ad_two_1", "ck_ad_two_2"
    }  # fmt: skip
    assert store.check().num_removed == 4
    head = store.head()
    supersede()
    assert store.head() == head, "nothing is said twice"


def test_one_that_was_cut_short_is_finished(
    store: EventStore, database_settings: Settings, supersede: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it ends, the log is whole, and what the log says is gone goes with the next sweep."""
    points = train(store, "ad_one", 4)
    remove, left = BlobStore.remove, iter([True, True, False])

    def dies(self: BlobStore, file: BlobFile) -> bool:
        if not next(left):
            raise KeyboardInterrupt
        return remove(self, file)

    monkeypatch.setattr(BlobStore, "remove", dies)
    with pytest.raises(KeyboardInterrupt):
        supersede()
    monkeypatch.undo()
    store.check()
    supersede()  # all is said already
    assert len(store.read(0, types=["bulk.compacted"])) == 1
    assert len(files(database_settings)) == 10
    store.check()
    assert store.sweeper.sweep(-1).num_files == 4
    assert files(database_settings) == {digest for point in points[2:] for digest in point.blobs.values()}
    assert store.sweeper.sweep(-1) == Swept()
    store.check()


def test_who_lost_the_lease_removes_nothing(
    store: EventStore, database_settings: Settings, lease: Lease, supersede: Callable[[], None]
) -> None:
    train(store, "ad_one", 4)
    store.release_lease(lease)
    assert store.acquire_lease("scheduler", "another", 60) is not None
    before = files(database_settings)
    with pytest.raises(Fenced):
        supersede()
    assert files(database_settings) == before and len(store.queries.recovery_points()) == 4
    store.check()
