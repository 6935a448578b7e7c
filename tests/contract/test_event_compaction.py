"""Old bulk is taken out: what was named is gone and nothing else, and the log verifies. On SQLite and Postgres."""

import pytest

from tests.contract.test_event_erasure import two_tenants
from tests.support import log
from tinkerbell.errors import Compacted, Gone
from tinkerbell.events.blobs import BlobFile, BlobStore
from tinkerbell.events.check_seals import KeptSeal
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.removal import Bulk
from tinkerbell.events.store import EventStore

NOW_US = 2**60


def compact(store: EventStore, told: list[Recorded]) -> tuple[Bulk, int]:
    """(what was said to go, files deleted)."""
    lease = store.acquire_lease("scheduler", "compactor", 30)
    assert lease is not None
    fence = (lease.resource, lease.epoch)
    positions = [recorded.position for recorded in told]
    try:
        bulk = store.retention.compact(told[0].tenant, positions, NOW_US, actor="me", fence=fence, tell=lambda *_: None)
        return bulk, store.retention.finish_compaction(lambda *_: None)
    finally:
        store.release_lease(lease)


def test_what_was_named_is_gone_and_nothing_else(store: EventStore) -> None:
    told = two_tenants(store)
    seal = store.seal()
    assert seal is not None
    small, large, *_, saved = told["alice"]
    expected = store.retention.bulk_at([small.position, large.position])
    bulk, num_files = compact(store, [small, large])
    assert bulk == expected and (bulk.num_bodies, bulk.num_blobs, num_files) == (1, 1, 1) and bulk.num_bytes > 0
    assert store.check(seal=KeptSeal(seal.root, seal.position)).num_removed == 2
    for recorded in (small, large):
        fresh = store.get(recorded.position)
        assert fresh is not None and fresh.hash == recorded.hash and fresh.body is None
        with pytest.raises(Compacted, match=rf"event {recorded.position} .*db compact"):
            store.body(fresh)
    assert store.blob(saved.blobs["weights"])
    for recorded in told["bob"]:
        assert (store.body(recorded) is None) == (recorded.body_codec is None)
        store.require_blobs(recorded.blobs.values())
    # There is nothing left to say, and what was said stays true.
    head = store.head()
    assert compact(store, [small, large]) == (Bulk(), 0)
    assert store.head() == head + 1, "only the lease"
    # Its data key is not destroyed: the tenant goes on.
    (again,) = store.append(log.forward_backward("ad_alice", "alice"))
    assert store.body(again) is not None
    store.check()


def test_what_a_copy_names_as_well_stays(store: EventStore) -> None:
    saved = two_tenants(store)["alice"][-1]
    (copied,) = store.append(log.copied(saved))
    bulk, num_files = compact(store, [saved])
    assert bulk.num_blobs == len(saved.blobs) and num_files == 0
    assert store.blob(copied.blobs["weights"])
    (again,) = store.append(log.copied(saved, "ck_again", "ad_again"))
    assert compact(store, [copied])[1] == 0
    assert compact(store, [again])[1] == len(saved.blobs)
    with pytest.raises(Compacted):
        store.blob(copied.blobs["weights"])
    with pytest.raises(Gone, match="cannot be shared any more"):
        store.append(log.copied(saved, "ck_late", "ad_late"))
    store.check()


def test_a_compaction_that_was_cut_short_is_finished_by_the_next(
    store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = two_tenants(store)

    def dies(self: BlobStore, file: BlobFile) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(BlobStore, "remove", dies)
    with pytest.raises(KeyboardInterrupt):
        compact(store, told["alice"][:2])
    monkeypatch.undo()
    store.check()
    assert compact(store, told["alice"][:2]) == (Bulk(), 1)
    store.check()
