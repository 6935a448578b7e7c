"""The writer's statements do the same on SQLite and Postgres, and none of them looks through the log."""

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from tests.support import log
from tinkerbell.config import Settings
from tinkerbell.events import facts
from tinkerbell.events import tables as t
from tinkerbell.events.engine import make_engine
from tinkerbell.events.statements import ROWS_AT_ONCE, Lookup, Statements
from tinkerbell.events.store import EventStore

VERSIONS = Lookup([t.streams.c.stream], [t.streams.c.stream, t.streams.c.version])


@pytest.fixture
def connection(database_settings: Settings, store: EventStore) -> Iterator[sa.Connection]:
    """Of an empty database with this release's tables; nothing of it is kept."""
    engine = make_engine(database_settings.url, role="writer")
    with engine.connect() as connection:
        connection.begin()
        yield connection
        connection.rollback()
    engine.dispose()


def streams(*numbers: int, version: int = 0) -> list[dict[str, object]]:
    return [{"stream": f"s{n}", "tenant": "t", "version": version, "head_hash": bytes([n % 251])} for n in numbers]


@pytest.mark.parametrize("num_rows", [1, 2, 3, ROWS_AT_ONCE - 1, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 5])
def test_any_number_of_rows_enters_and_is_found(connection: sa.Connection, num_rows: int) -> None:
    statements = Statements(connection)
    statements.insert(t.streams, streams(*range(num_rows)))
    stored = connection.execute(sa.select(t.streams).order_by(t.streams.c.stream)).mappings().all()
    assert [dict(row) for row in stored] == sorted(streams(*range(num_rows)), key=lambda row: str(row["stream"]))
    found = statements.look_up(VERSIONS, {f"s{n}" for n in range(0, num_rows, 2)} | {"other"})
    assert sorted(found) == sorted((f"s{n}", 0) for n in range(0, num_rows, 2))
    assert statements.look_up(VERSIONS, set()) == []


def test_a_taken_key_fails_is_ignored_replaces_or_adds(connection: sa.Connection) -> None:
    statements = Statements(connection)
    statements.insert(t.streams, streams(1, 2, version=5))
    statements.insert(t.streams, streams(2, 3, version=7), "ignore")
    assert sorted(statements.look_up(VERSIONS, ["s1", "s2", "s3"])) == [("s1", 5), ("s2", 5), ("s3", 7)]
    statements.insert(t.streams, streams(1, 2, version=9), "replace")
    assert sorted(statements.look_up(VERSIONS, ["s1", "s2"])) == [("s1", 9), ("s2", 9)]
    used = {"hour_us": 1, "tenant": "t", "adapter": "", "kind": "sample", "num_requests": 1, "tokens_in": 2}
    for _ in range(3):
        statements.insert(t.usage, [{**used, "tokens_out": 4, "cost_us": 10}], "add")
    assert connection.execute(sa.select(t.usage.c.num_requests, t.usage.c.cost_us)).one() == (3, 30)
    with pytest.raises(Exception) as error:
        statements.insert(t.streams, streams(1))
    assert isinstance(error.value, connection.engine.dialect.loaded_dbapi.IntegrityError)  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_rows", [1, 5])
def test_an_update_changes_the_named_rows_only(connection: sa.Connection, num_rows: int) -> None:
    statements = Statements(connection)
    statements.insert(t.streams, streams(*range(8)))
    statements.update(t.streams, [{"stream": f"s{n}", "version": 10 + n} for n in range(num_rows)])
    found = dict(statements.look_up(VERSIONS, [f"s{n}" for n in range(8)]))
    assert found == {f"s{n}": 10 + n if n < num_rows else 0 for n in range(8)}


LOOKUPS = {name: value for name, value in vars(facts).items() if isinstance(value, Lookup)}


@pytest.mark.parametrize("name", LOOKUPS)
def test_sqlite_finds_the_writers_facts_by_an_index(sqlite_store: EventStore, settings: Settings, name: str) -> None:
    text = LOOKUPS[name].texts["sqlite"]
    assert_no_scan(settings, text, ["[]"] * text.count("?"))


def test_sqlites_triggers_use_indexes(sqlite_store: EventStore, settings: Settings) -> None:
    """Each insert asks whether its keys are taken."""
    engine = make_engine(settings.url, role="reader")
    with engine.connect() as connection:
        query = "SELECT sql FROM sqlite_master WHERE type = 'trigger' AND name LIKE '%no_replace'"
        triggers = connection.exec_driver_sql(query).scalars().all()
    engine.dispose()
    assert len(triggers) == 2
    for trigger in triggers:
        asked = trigger[trigger.index("WHEN") + 4 : trigger.index("BEGIN")]
        new = {f"NEW.{column}" for column in t.events.columns.keys() + ["name"]}  # noqa: RUF005
        for column in sorted(new, key=len, reverse=True):
            asked = asked.replace(column, "'x'")
        assert_no_scan(settings, f"SELECT {asked}", [])


def assert_no_scan(settings: Settings, text: str, parameters: list[str]) -> None:
    engine = make_engine(settings.url, role="reader")
    with engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", tuple(parameters)).all()
    engine.dispose()
    steps = [row[-1] for row in plan]
    assert any(step.startswith("SEARCH") for step in steps), steps
    # Arrays of values are virtual tables, and expressions without a table are constant rows.
    harmless = ("VIRTUAL TABLE", "CONSTANT ROW")
    assert [step for step in steps if step.startswith("SCAN") and not any(word in step for word in harmless)] == []


@pytest.mark.postgres
def test_postgres_finds_idempotency_keys_by_their_index(settings: Settings, postgres_url: str) -> None:
    engine = make_engine(postgres_url, role="writer")
    with engine.connect() as connection:
        connection.exec_driver_sql("SET enable_seqscan = off")
        text = LOOKUPS["_ORIGINALS"].texts["postgresql"]
        plan = "\n".join(connection.exec_driver_sql(f"EXPLAIN {text}", (["t"], ["k"])).scalars())
        connection.rollback()
    engine.dispose()
    assert "uq_events_idempotency_key" in plan
    condition = plan[plan.index("Index Cond: ((") :].splitlines()[0]
    assert "tenant" in condition and "idempotency_key" in condition


def test_the_event_of_a_used_key_comes_from_the_right_tenant(store: EventStore) -> None:
    """Two tenants use each other's keys in one group."""
    mine = store.append(log.add_lora("ad_a", "alice", key="k1"))
    theirs = store.append(log.add_lora("ad_b", "bob", key="k1"))
    futures = [store.submit(log.add_lora(a, tenant, key="k1")) for a, tenant in (("ad_a", "alice"), ("ad_b", "bob"))]
    assert [future.result() for future in futures] == [mine, theirs]
