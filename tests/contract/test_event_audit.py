"""`audit verify` sees what is wrong around the log: keys, schema, and events that nobody with the key file wrote. On
SQLite and Postgres."""

import hashlib
import re
from contextlib import closing
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from tests.support import log
from tests.support.life import live
from tests.support.owner import as_owner
from tinkerbell.config import Settings
from tinkerbell.errors import Corrupt, KeyUnavailable
from tinkerbell.events import holdings, kinds
from tinkerbell.events import tables as t
from tinkerbell.events.chain import link
from tinkerbell.events.check_schema import check_schema, compare
from tinkerbell.events.engine import make_engine
from tinkerbell.events.store import EventStore
from tinkerbell.files import write_private


def refused(settings: Settings, match: str, **options: Any) -> None:
    with closing(EventStore.open(settings)) as later, pytest.raises(Corrupt, match=match):
        later.audit(**options)


@pytest.fixture
def lived(store: EventStore) -> EventStore:
    live(store)
    return store


def test_a_log_that_lived_is_whole(lived: EventStore) -> None:
    found = lived.audit()
    assert found.log.num_events == lived.head()
    assert found.num_keys == 2 and found.authenticated_from == 1 and found.num_schema_parts > 20
    assert lived.audit(with_keys=False).num_keys is None


# ---- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"wrapped": None}, "tenant alice was destroyed, and the tenant was not erased"),
        ({"wrapped": b"\0" * 60}, "tenant alice was changed"),
        ({"wrapped": b"short"}, "tenant alice was changed"),
        ({"id": b"\1" * 16}, "tenant alice was changed"),
        ({"tenant": "mallory"}, "tenant mallory was changed"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_key_that_cannot_be_used_is_named(
    lived: EventStore, database_settings: Settings, values: dict[str, Any], says: str
) -> None:
    with as_owner(database_settings) as connection:
        connection.execute(t.data_keys.update().where(t.data_keys.c.tenant == "alice").values(**values))
    refused(database_settings, says)


def test_keys_that_were_swapped_or_deleted_are_named(lived: EventStore, database_settings: Settings) -> None:
    keys = t.data_keys
    with as_owner(database_settings) as connection:
        wrapped = {row.tenant: row.wrapped for row in connection.execute(sa.select(keys))}
        for tenant, other in (("alice", "bob"), ("bob", "alice")):
            connection.execute(keys.update().where(keys.c.tenant == tenant).values(wrapped=wrapped[other]))
    refused(database_settings, "tenant alice was changed.*tenant bob was changed")
    with as_owner(database_settings) as connection:
        for tenant, value in wrapped.items():
            connection.execute(keys.update().where(keys.c.tenant == tenant).values(wrapped=value))
        connection.execute(keys.delete().where(keys.c.tenant == "bob"))
    refused(database_settings, "there is no data key")


def test_a_replaced_and_a_missing_key_file_are_named(lived: EventStore, database_settings: Settings) -> None:
    kept = database_settings.key_path.read_text()
    write_private(database_settings.key_path, "ab" * 32)
    with closing(EventStore.open(database_settings)) as later:
        with pytest.raises(Corrupt, match="not that of this log's key file"):
            later.audit()
        with pytest.raises(KeyUnavailable, match="were not wrapped by"):
            later.append(log.add_lora("ad_blind"))
    database_settings.key_path.unlink()
    with closing(EventStore.open(database_settings)) as later:
        with pytest.raises(KeyUnavailable, match="missing"):
            later.audit()
        assert later.audit(with_keys=False).log.num_events == lived.head()
        with pytest.raises(KeyUnavailable):
            later.append(log.add_lora("ad_blind"))
    write_private(database_settings.key_path, kept)
    assert lived.audit().num_keys == 2


# ---- who wrote it --------------------------------------------------------------------------------------------------


def forged_key(settings: Settings, *, mac: bytes | None) -> int:
    """An admin key of somebody who may write the database: a valid event with its hash, projection and head."""
    made = kinds.KeyCreated(key_id="k_evil", key_hash=hashlib.sha256(b"secret").hexdigest(), admin=True)
    data = msgspec.json.encode(made, order="deterministic").decode()
    with as_owner(settings) as connection:
        position = connection.execute(sa.select(t.log_head.c.position)).scalar_one() + 1
        head = connection.execute(sa.select(t.streams).where(t.streams.c.stream == "tenant/alice")).one()
        row = dict.fromkeys(t.events.c.keys())
        row |= {"position": position, "stream": "tenant/alice", "stream_version": head.version + 1}
        row |= {"type": "key.created", "schema_version": 1, "tenant": "alice", "data": data, "num_blobs": 0}
        row |= {"created_us": 1_700_000_000_000_000, "prev_hash": head.head_hash}
        row["hash"] = link(head.head_hash, row, {})
        connection.execute(t.events.insert().values(**row))
        connection.execute(t.log_head.update().values(position=position))
        values = {"version": row["stream_version"], "head_hash": row["hash"]}
        connection.execute(t.streams.update().where(t.streams.c.stream == "tenant/alice").values(**values))
        connection.execute(
            t.api_keys.insert().values(
                key_id="k_evil",
                tenant="alice",
                key_hash=made.key_hash,
                admin=True,
                note="",
                created_us=row["created_us"],
            )
        )
        counted = holdings.stored_now(connection)["alice"]
        connection.execute(t.stored.update().where(t.stored.c.tenant == "alice").values(num_bytes=counted))
        if mac is not None:
            connection.execute(t.commit_macs.insert().values(position=position, first=position, mac=mac))
    return int(position)


@pytest.mark.parametrize("mac", [None, b"\0" * 32], ids=["no mac", "some mac"])
def test_a_forged_key_under_seals_is_found(store: EventStore, database_settings: Settings, mac: bytes | None) -> None:
    live(store)
    store.seal()
    position = forged_key(database_settings, mac=mac)
    store.check()  # every hash, projection and seal is as it must be
    with closing(EventStore.open(database_settings)) as later:
        later.append(log.add_lora("ad_more"))
        later.seal()
        later.check()
    refused(database_settings, f"I18 at position {position}")


def test_a_log_of_an_older_release_is_authenticated_from_its_upgrade_on(
    store: EventStore, database_settings: Settings
) -> None:
    events = live(store)
    with as_owner(database_settings) as connection:
        connection.execute(t.commit_macs.delete())
    assert store.audit().authenticated_from is None
    store.append(log.add_lora("ad_more"))
    assert store.audit().authenticated_from == len(events) + 1
    with as_owner(database_settings) as connection:
        connection.execute(t.commit_macs.update().values(first=len(events) + 2))
    refused(database_settings, "I18")


def test_who_has_another_key_file_appends_nothing(store: EventStore, database_settings: Settings) -> None:
    """Before there is any data key, too."""
    store.append(log.add_lora())
    elsewhere = database_settings.key_path.with_name("another")
    write_private(elsewhere, "cd" * 32)
    settings = msgspec.structs.replace(database_settings, key_file=str(elsewhere))
    with closing(EventStore.open(settings)) as other, pytest.raises(KeyUnavailable, match="not written with it"):
        other.append(log.add_lora("ad_two"))
    store.append(log.add_lora("ad_two"))
    assert store.audit().authenticated_from == 1


def test_without_encryption_nothing_makes_a_key_file(settings: Settings) -> None:
    with closing(EventStore.open(msgspec.structs.replace(settings, encryption="off"))) as store:
        store.append(log.add_lora())
        assert store.audit().authenticated_from is None and not settings.key_path.exists()
    with closing(EventStore.open(settings)) as store:
        store.append(log.add_lora("ad_two"))
        assert store.audit().authenticated_from == 2


# ---- the schema ----------------------------------------------------------------------------------------------------


def statements(dialect: str) -> dict[str, str]:
    """What somebody may do to the schema -> what the audit says."""
    both = {
        "DROP INDEX uq_events_terminal": "index uq_events_terminal is missing",
        "DROP VIEW audit_usage": "view audit_usage is missing",
        "DROP VIEW audit_stuck;; CREATE VIEW audit_stuck AS SELECT 1 AS id": "view audit_stuck was changed",
    }
    if dialect == "sqlite":
        return both | {
            "DROP TRIGGER events_no_update": "trigger events_no_update is missing",
            "DROP TRIGGER events_no_delete;; CREATE TRIGGER events_no_delete BEFORE DELETE ON events WHEN 0"
            " BEGIN SELECT 1; END": "trigger events_no_delete was changed",
            "CREATE TRIGGER quiet AFTER INSERT ON events BEGIN SELECT 1; END": "trigger quiet was added",
            "ALTER TABLE usage ADD COLUMN more INTEGER": "table usage was changed",
        }
    return both | {
        "DROP TRIGGER events_only_bodies_leave ON events": "trigger events.events_only_bodies_leave is missing",
        "ALTER TABLE events DISABLE TRIGGER events_append_only": "trigger events.events_append_only was changed",
        "CREATE OR REPLACE FUNCTION tinkerbell_append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW;"
        " END $$": "function tinkerbell_append_only was changed",
        "CREATE RULE quiet AS ON DELETE TO blobs DO INSTEAD NOTHING": "rule blobs.quiet was added",
        "ALTER TABLE samplers ALTER COLUMN session DROP NOT NULL": "column samplers.session was changed",
        "ALTER TABLE samplers DROP COLUMN created_us": "column samplers.created_us is missing",
        "ALTER TABLE futures DROP CONSTRAINT ck_futures_state": "constraint futures.ck_futures_state is missing",
    }


def test_whatever_is_done_to_the_schema_is_named(database_settings: Settings) -> None:
    engine = make_engine(database_settings.url, role="writer")
    try:
        number = check_schema(engine)
        for statement, says in statements(engine.dialect.name).items():
            with engine.connect() as connection:
                transaction = connection.begin()
                for part in statement.split(";; "):
                    connection.exec_driver_sql(part)
                with pytest.raises(Corrupt, match=f"I17: .*{re.escape(says)}") as found:
                    compare(connection)
                transaction.rollback()
            assert found.value.extra["invariant"] == "I17"
        assert check_schema(engine) == number, "looking changes nothing"
    finally:
        engine.dispose()


def test_an_index_or_a_table_more_is_its_owners_business(store: EventStore, database_settings: Settings) -> None:
    number = store.audit().num_schema_parts
    with as_owner(database_settings) as connection:
        connection.exec_driver_sql("CREATE INDEX mine ON events (actor)")
        connection.exec_driver_sql("CREATE TABLE notes (text TEXT)")
    assert store.audit().num_schema_parts == number
