"""A tenant is erased: nothing of its data can be read, and the log still verifies. On SQLite and Postgres."""

import os
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from tests.contract.test_event_encryption import PATTERN, secret_request
from tests.support import log
from tests.support.life import live
from tests.support.owner import as_owner
from tinkerbell.config import Settings
from tinkerbell.errors import Conflict, Corrupt, Erased, Gone, NotFound
from tinkerbell.events import kinds
from tinkerbell.events import tables as t
from tinkerbell.events.blobs import BlobFile, BlobStore
from tinkerbell.events.check_seals import KeptSeal
from tinkerbell.events.engine import make_engine
from tinkerbell.events.kinds import NewEvent, Recorded
from tinkerbell.events.retention import Removal
from tinkerbell.events.store import EventStore


def erase(store: EventStore, tenant: str = "alice") -> Removal:
    lease = store.acquire_lease("scheduler", "eraser", 30)
    assert lease is not None
    try:
        fence = (lease.resource, lease.epoch)
        return store.retention.erase(tenant, actor="eraser", fence=fence, tell=lambda *_: None)
    finally:
        store.release_lease(lease)


def two_tenants(store: EventStore) -> dict[str, list[Recorded]]:
    """alice and bob have the same: bodies inline and as blobs, a checkpoint, a key."""
    told: dict[str, list[Recorded]] = {}
    for tenant in ("alice", "bob"):
        adapter = f"ad_{tenant}"
        key = kinds.KeyCreated(key_id=f"k_{tenant}", key_hash="00" * 32)
        (made,) = store.append(log.add_lora(adapter, tenant))
        store.append(log.add_lora_completed(made), NewEvent(event=key, tenant=tenant, stream=f"tenant/{tenant}"))
        small, large = store.append(secret_request(adapter, tenant), secret_request(adapter, tenant, times=2000))
        saved = store.append(log.save(adapter, tenant, f"ck_{tenant}"))[0]
        results = [log.forward_backward_completed(small), log.forward_backward_completed(large)]
        told[tenant] = [small, large, *store.append(*results, log.save_completed(saved, weights=PATTERN * 50))]
    return told


def files_with(pattern: bytes, *roots: Path) -> list[Path]:
    return [path for root in roots for path in root.rglob("*") if path.is_file() and pattern in path.read_bytes()]


def test_nothing_of_the_tenant_can_be_read_and_the_log_verifies(store: EventStore, database_settings: Settings) -> None:
    told = two_tenants(store)
    seal = store.seal()
    assert seal is not None
    done = erase(store)
    assert (done.num_adapters, done.num_checkpoints, done.num_keys_revoked, done.num_keys_destroyed) == (1, 1, 1, 1)
    assert (done.bulk.num_bodies, done.bulk.num_blobs, done.num_files) == (3, 4, 4)
    assert store.check(seal=KeptSeal(seal.root, seal.position)).num_removed == 5
    for recorded in told["alice"]:
        fresh = store.get(recorded.position)
        assert fresh is not None and fresh.body is None and fresh.hash == recorded.hash
        if fresh.body_codec is not None:
            for each in (recorded, fresh):
                with pytest.raises(Erased, match="alice"):
                    store.body(each)
        for digest in recorded.blobs.values():
            with pytest.raises(Erased, match=f"event {recorded.position} .* tenant alice"):
                store.blob(digest)
            with pytest.raises(Erased):
                store.require_blobs([digest])
    for recorded in told["bob"]:
        assert (store.body(recorded) is None) == (recorded.body_codec is None)
        store.require_blobs(recorded.blobs.values())
    assert store.blob(told["bob"][-1].blobs["weights"]) == PATTERN * 50
    assert store.queries.keys("alice")[0].revoked_us and not store.queries.keys("bob")[0].revoked_us
    adapter = store.queries.adapter("alice", "ad_alice")
    assert adapter is not None and adapter.state == "removed"
    with pytest.raises(NotFound):
        store.append(log.forward_backward("ad_alice"))
    assert erase(store).position is None, "there is nothing left to say"
    # The name can be used again, with another key; a second erasure takes that as well.
    (again,) = store.append(log.sample(None, "alice"))
    store.append(log.sample_completed(again))
    assert store.body(again) is not None
    assert erase(store).bulk.num_bodies == 2
    store.check()


def postgres_files(settings: Settings) -> Path:
    """Where the database's tables are, as the server has them on disk."""
    engine = make_engine(settings.url, role="reader")
    with engine.connect() as connection:
        connection.exec_driver_sql("CHECKPOINT")
        directory = connection.exec_driver_sql("SHOW data_directory").scalar_one()
        number = connection.exec_driver_sql("SELECT oid FROM pg_database WHERE datname = current_database()")
        path = Path(directory) / "base" / str(number.scalar_one())
    engine.dispose()
    return path


def test_what_was_never_encrypted_leaves_no_trace(database_settings: Settings) -> None:
    """In no file of the data directory: no free page, no write-ahead log. With Postgres in none of its tables."""
    off = msgspec.structs.replace(database_settings, encryption="off")
    roots = [Path(off.data_dir)]
    secret, others = os.urandom(400), os.urandom(400)
    with closing(EventStore.open(off)) as store:
        for tenant, pattern in (("alice", secret), ("bob", others)):
            adapter = f"ad_{tenant}"
            (made,) = store.append(log.add_lora(adapter, tenant))
            store.append(log.add_lora_completed(made))
            for prompt in (pattern, pattern + os.urandom(100_000)):
                asked = kinds.SampleRequested(params=log.SamplingParams(), num_tokens=100)
                body = kinds.SampleBody(prompt)
                (sample,) = store.append(log.request(asked, None, tenant, body=body))
                store.append(log.sample_completed(sample))
            (wanted,) = store.append(log.save(adapter, tenant, f"ck_{tenant}"))
            store.append(log.save_completed(wanted, weights=pattern))
        if off.url.startswith("postgresql"):
            roots.append(postgres_files(off))
        kept = len(files_with(others, *roots))
        assert len(files_with(secret, *roots)) == kept >= 3, "the test sees what is there"
        erase(store)
        if off.url.startswith("postgresql"):
            postgres_files(off)
        assert files_with(secret, *roots) == []
        assert len(files_with(others, *roots)) >= 3
        report = store.check()
        assert report.num_removed == 5
        # Equal ones are stored once where they are not encrypted: what bob has as well is still his.
        (config,) = [row.blobs["adapter_config"] for row in store.queries.checkpoints("bob")]
        assert store.blob(config) == b"{}"


def test_copies_are_erased_with_their_tenant(store: EventStore) -> None:
    saved = two_tenants(store)["alice"][-1]
    (copied,) = store.append(log.copied(saved))
    done = erase(store)
    assert (done.num_checkpoints, done.num_files) == (2, 4)
    with pytest.raises(Erased, match="alice"):
        store.blob(copied.blobs["weights"])
    with pytest.raises(Gone):
        store.append(log.copied(saved, "ck_late", "ad_late"))
    store.check()


def test_a_clock_that_was_ahead_saves_no_key(store: EventStore, database_settings: Settings) -> None:
    two_tenants(store)
    mine = t.data_keys.c.tenant == "alice"
    with as_owner(database_settings) as connection:
        connection.execute(t.data_keys.update().where(mine).values(created_us=2**60))
    assert erase(store).num_keys_destroyed == 1
    with as_owner(database_settings) as connection:
        assert connection.execute(sa.select(t.data_keys.c.wrapped).where(mine)).scalars().all() == [None]
    store.check()


def test_an_erasure_that_was_cut_short_is_named_and_finished(
    store: EventStore, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_tenants(store)
    remove, steps = BlobStore.remove, iter([True, False])

    def dies(self: BlobStore, file: BlobFile) -> bool:
        if not next(steps):
            raise KeyboardInterrupt
        return remove(self, file)

    monkeypatch.setattr(BlobStore, "remove", dies)
    with pytest.raises(KeyboardInterrupt):
        erase(store)
    monkeypatch.undo()
    with pytest.raises(Corrupt, match=r"I16.*tenants erase"):
        store.check()
    done = erase(store)
    assert done.position is None and done.num_files == 3
    store.check()
    with as_owner(database_settings) as connection:
        connection.execute(t.data_keys.update().where(t.data_keys.c.tenant == "alice").values(wrapped=b"back"))
    with pytest.raises(Corrupt, match="I16: tenant alice was erased, and yet a key"):
        store.check()


def test_who_has_pending_requests_or_is_nobody_is_not_erased(store: EventStore) -> None:
    live(store)
    head = store.head()
    with pytest.raises(Conflict, match="1 requests of tenant alice"):
        store.retention.plan("alice")
    for nobody in ("carol", "system"):
        with pytest.raises(NotFound):
            store.retention.plan(nobody)
    assert store.head() == head


@pytest.mark.parametrize(
    "change",
    [
        "body = NULL",
        "data = '{}'",
        "tenant = 'bob'",
        "body = NULL, data = '{}'",
        "hash = prev_hash",
        "position = 99999",
    ],
)
def test_triggers_let_nothing_go_but_what_was_erased(
    store: EventStore, database_settings: Settings, change: str
) -> None:
    told = two_tenants(store)
    engine = sa.create_engine(database_settings.url, poolclass=sa.NullPool)

    def try_it(tenant: str) -> None:
        with engine.begin() as connection:
            where = f"position = {told[tenant][0].position}"
            connection.exec_driver_sql(f"UPDATE events SET {change} WHERE {where}")

    with pytest.raises(sa.exc.DBAPIError, match="append-only"):
        try_it("alice")
    erase(store)
    with pytest.raises(sa.exc.DBAPIError, match="append-only"):
        try_it("bob")
    if change == "body = NULL":
        try_it("alice")
    else:
        with pytest.raises(sa.exc.DBAPIError, match="append-only"):
            try_it("alice")
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
        connection.exec_driver_sql(f"DELETE FROM events WHERE position = {told['alice'][0].position}")
    store.check()


def test_a_body_cannot_come_back(store: EventStore, database_settings: Settings) -> None:
    told = two_tenants(store)
    erase(store)
    small = told["alice"][0]
    with as_owner(database_settings) as connection:
        connection.execute(t.events.update().where(t.events.c.position == small.position).values(body=small.body))
    with pytest.raises(Corrupt, match="I16"):
        store.check()


def test_a_body_taken_out_without_an_event_that_says_so_is_missed(
    store: EventStore, database_settings: Settings
) -> None:
    told = two_tenants(store)
    at = told["alice"][0].position
    with as_owner(database_settings) as connection:
        connection.execute(t.events.update().where(t.events.c.position == at).values(body=None))
    with pytest.raises(Corrupt, match=f"I14 at position {at}"):
        store.check()
    with as_owner(database_settings) as connection:
        connection.execute(t.removed_bulk.insert().values(position=at, removed_by=1))
    with pytest.raises(Corrupt, match=r"I5.*removed_bulk"):
        store.check()
