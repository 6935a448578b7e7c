"""Nothing in the log can change unnoticed, and the projections are what the log says. On SQLite and Postgres."""

from contextlib import closing
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from tests.support import log
from tests.support.life import live
from tests.support.owner import as_owner
from tinkerbell.config import Settings
from tinkerbell.errors import Corrupt
from tinkerbell.events import check, kinds
from tinkerbell.events import tables as t
from tinkerbell.events.chain import HASHED
from tinkerbell.events.engine import make_engine
from tinkerbell.events.kinds import NewEvent
from tinkerbell.events.store import EventStore


def changed(column: sa.Column[Any], value: Any) -> Any:
    """Another value that the column can hold."""
    match value:
        case bytes():
            return bytes([value[0] ^ 1]) + value[1:]
        case int() | float():
            return value + 1000
        case str() if isinstance(column.type, sa.JSON):
            return f"{value[:-1]} {value[-1:]}"
        case str() if column.name == "body_codec":
            return "zstd" if value == "msgpack" else "msgpack"
        case str():
            return value + "x"
        case None if isinstance(column.type, sa.LargeBinary):
            return b"\x01" * 32
        case None if isinstance(column.type, sa.Text):
            return "x"
        case _:
            return 7


def remove(store: EventStore) -> None:
    """What is said when bulk goes, of somebody who has none."""
    for type_ in ("tenant.erased", "bulk.compacted"):
        store.append(NewEvent(event=log.examples()[type_][0], tenant="carol", stream="tenant/carol"))


def test_the_story_holds_together(store: EventStore) -> None:
    events = live(store)
    report = store.check()
    assert report.num_events == len(events) == store.head()
    assert (report.num_requests, report.num_results, report.num_pending) == (11, 10, 1)
    assert report.cost_us == 900
    assert report.num_adapters == 4, "a copy has one, too"


def test_projections_are_the_fold_of_the_log(store: EventStore, database_settings: Settings) -> None:
    live(store)
    remove(store)
    folded = check.rebuild(iter(store.read()))
    engine = make_engine(database_settings.url, role="reader")
    with engine.connect() as connection:
        stored = check.stored_projections(connection)
    engine.dispose()
    assert set(folded) == set(stored), "the story reaches every projection"
    assert stored == folded


def test_a_change_of_any_column_of_any_event_is_detected(sqlite_store: EventStore, settings: Settings) -> None:
    events = live(sqlite_store)
    for column in [t.events.c[name] for name in (*HASHED, "body", "prev_hash", "hash")]:
        for position in range(1, len(events) + 1):
            where = t.events.c.position == position
            with as_owner(settings) as connection:
                old = connection.execute(sa.select(column).where(where)).scalar_one()
                # Some columns are unique: the new value must be nobody's.
                unique = column.name in ("position", "stream_version")
                new = 10_000 + position if unique else changed(column, old)
                connection.execute(t.events.update().where(where).values({column.name: new}))
            with pytest.raises(Corrupt) as error:
                sqlite_store.check()
            assert error.value.extra["invariant"] in ("I1", "I2", "I3", "I14"), (column, position)
            with as_owner(settings) as connection:
                at = t.events.c.position == (new if column.name == "position" else position)
                connection.execute(t.events.update().where(at).values({column.name: old}))
    sqlite_store.check()


@pytest.mark.parametrize("column", ["data", "created_us", "idempotency_key", "body", "seq", "actor", "hash"])
def test_a_change_is_detected_on_both_databases(store: EventStore, database_settings: Settings, column: str) -> None:
    events = live(store)
    position = next(item.position for item in events if isinstance(item.event, kinds.ForwardBackwardRequested))
    with as_owner(database_settings) as connection:
        where = t.events.c.position == position
        old = connection.execute(sa.select(t.events.c[column]).where(where)).scalar_one()
        connection.execute(t.events.update().where(where).values({column: changed(t.events.c[column], old)}))
    with pytest.raises(Corrupt) as error:
        store.check()
    assert error.value.extra["position"] == position


def test_a_removed_tail_is_detected(store: EventStore, database_settings: Settings) -> None:
    events = live(store)
    with as_owner(database_settings) as connection:
        connection.execute(t.events.delete().where(t.events.c.position == len(events)))
    with pytest.raises(Corrupt, match="I1"):
        store.check()


PROJECTED = [
    column
    for table in t.PROJECTIONS.values()
    for column in table.columns
    if not column.primary_key and column is not t.leases.c.expires_us and not isinstance(column.type, sa.Boolean)
]
OTHER_STATE = {"futures": "failed", "adapters": "removed", "checkpoints": "recovery", "batches": "lost"}


def test_a_change_of_any_projected_column_is_detected(sqlite_store: EventStore, settings: Settings) -> None:
    live(sqlite_store)
    remove(sqlite_store)
    for column in PROJECTED:
        table = column.table
        assert isinstance(table, sa.Table)
        keys = list(table.primary_key)
        limited = any(isinstance(rule, sa.CheckConstraint) for rule in column.constraints)
        query = sa.select(column, *keys).limit(1)
        if limited:
            query = query.where(column != OTHER_STATE[table.name])
        with as_owner(settings) as connection:
            row = connection.execute(query).first()
            assert row is not None, f"the story has no such {column}"
            new = OTHER_STATE[table.name] if limited else changed(column, row[0])
            where = sa.and_(*(key == value for key, value in zip(keys, row[1:], strict=True)))
            connection.execute(table.update().where(where).values({column.name: new}))
        with pytest.raises(Corrupt) as error:
            sqlite_store.check()
        assert error.value.extra["invariant"] == "I5", column
        with as_owner(settings) as connection:
            connection.execute(table.update().where(where).values({column.name: row[0]}))
    sqlite_store.check()


def test_lost_and_changed_blobs_are_detected(store: EventStore, database_settings: Settings) -> None:
    events = live(store)
    saved = next(item for item in events if isinstance(item.event, kinds.SaveCompleted))
    path = store._blobs.path(saved.blobs["weights"])
    data = path.read_bytes()
    path.write_bytes(b"x" + data[1:])
    for ask in (store.check, lambda: store.blob(saved.blobs["weights"])):
        with pytest.raises(Corrupt):
            ask()
    path.unlink()
    with pytest.raises(Corrupt, match="missing"):
        store.check()
    path.write_bytes(data)
    store.check()
    with as_owner(database_settings) as connection:
        connection.execute(t.event_blobs.update().where(t.event_blobs.c.name == "optimizer").values(name="other"))
    with pytest.raises(Corrupt, match="I3"):
        store.check()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET tenant = 'mallory'",
        "DELETE FROM events",
        "DELETE FROM events WHERE position = 1",
        "UPDATE event_blobs SET name = 'x'",
        "DELETE FROM event_blobs",
    ],
)
def test_the_log_is_append_only(store: EventStore, database_settings: Settings, statement: str) -> None:
    live(store)
    refuse_as_append_only(database_settings, statement)
    store.check()


@pytest.mark.postgres
@pytest.mark.parametrize("statement", ["TRUNCATE events CASCADE", "TRUNCATE event_blobs"])
def test_postgres_empties_no_table_of_the_log(settings: Settings, postgres_url: str, statement: str) -> None:
    settings = msgspec.structs.replace(settings, database_url=postgres_url)
    with closing(EventStore.open(settings)) as store:
        live(store)
        refuse_as_append_only(settings, statement)
        store.check()


@pytest.mark.parametrize(
    "same", ["position", "stream, stream_version", "tenant, idempotency_key", "causation", "position, name"]
)
def test_sqlite_replaces_nothing_of_the_log(sqlite_store: EventStore, settings: Settings, same: str) -> None:
    """INSERT OR REPLACE deletes what is in its way, and no DELETE trigger hears of it."""
    live(sqlite_store)
    kept = {name.strip() for name in same.split(",")}
    table = t.event_blobs if "name" in kept else t.events
    other = {"position": "position + 1000", "stream_version": "stream_version + 1000", "causation": "NULL"}
    other |= {"idempotency_key": "NULL", "blob_hash": "blob_hash"}
    values = [other.get(c.name, c.name) if c.name not in kept else c.name for c in table.columns]
    where = " AND ".join(f"{name} IS NOT NULL" for name in kept)
    names = ", ".join(column.name for column in table.columns)
    query = f"SELECT {', '.join(values)} FROM {table.name} WHERE {where} LIMIT 1"
    refuse_as_append_only(settings, f"INSERT OR REPLACE INTO {table.name} ({names}) {query}")
    sqlite_store.check()


def refuse_as_append_only(settings: Settings, statement: str) -> None:
    engine = sa.create_engine(settings.url, poolclass=sa.NullPool)
    with engine.connect() as connection, pytest.raises(sa.exc.DBAPIError, match="append-only"):
        connection.exec_driver_sql(statement)
    engine.dispose()


@pytest.mark.parametrize(
    ("statement", "invariant"),
    [
        ("UPDATE events SET created_us = created_us + 0.5 WHERE position = 3", "I3"),
        ("UPDATE events SET seq = 'one' WHERE position = 3", "I3"),
        ("UPDATE events SET body = 'text' WHERE body IS NOT NULL", "I14"),
        ("DELETE FROM log_head", "I1"),
        ("UPDATE blobs SET location = 'elsewhere'", "I14"),
        ("UPDATE blobs SET hash = CAST(length AS TEXT)", "I14"),
    ],
)
def test_values_that_no_event_can_have_are_corrupt_and_no_accident(
    sqlite_store: EventStore, settings: Settings, statement: str, invariant: str
) -> None:
    live(sqlite_store)
    with as_owner(settings) as connection:
        connection.exec_driver_sql(statement)
    with pytest.raises(Corrupt) as error:
        sqlite_store.check()
    assert error.value.extra["invariant"] == invariant


def test_the_database_itself_refuses_a_second_result(store: EventStore, database_settings: Settings) -> None:
    events = live(store)
    answered = next(item for item in events if isinstance(item.event, kinds.Result))
    engine = make_engine(database_settings.url, role="writer")
    with engine.connect() as connection:
        row = connection.execute(sa.select(t.events).where(t.events.c.position == answered.position)).mappings().one()
        second = {**row, "position": 999, "stream_version": 999, "type": "add_lora.failed"}
        with pytest.raises(sa.exc.IntegrityError):
            connection.execute(t.events.insert(), [second])
    engine.dispose()
