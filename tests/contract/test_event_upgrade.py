"""A log of an older release is upgraded to what its events fold to. On SQLite and Postgres."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.support.life import live
from tinkerbell.cli.bench.long_log import LongLog
from tinkerbell.config import Settings
from tinkerbell.events import schema
from tinkerbell.events import tables as t
from tinkerbell.events.engine import make_engine
from tinkerbell.events.store import EventStore

BEFORE_TOTALS = "0006"


@pytest.fixture
def older(database_settings: Settings) -> Settings:
    """A log as it was before totals were kept."""
    store = EventStore.open(database_settings)
    live(store)
    LongLog(store).fill("alice", 3, 2)
    store.check()
    store.close()
    put_back(database_settings, BEFORE_TOTALS)
    return database_settings


def put_back(settings: Settings, revision: str) -> None:
    """The same rows in the tables and columns that there were at a revision."""
    engine = make_engine(settings.url, role="writer")
    with engine.connect() as connection:
        there = sa.MetaData()
        there.reflect(connection)
        kept = {table.name: connection.execute(table.select()).mappings().all() for table in there.sorted_tables}
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("DROP SCHEMA public CASCADE")
            connection.exec_driver_sql("CREATE SCHEMA public")
            connection.commit()
    engine.dispose()
    if settings.url.startswith("sqlite"):
        for file in Path(settings.data_dir).glob("tinkerbell.db*"):
            file.unlink()
    engine = make_engine(settings.url, role="writer")
    with engine.begin() as connection:
        schema.migrate(connection, revision)
        then = sa.MetaData()
        then.reflect(connection)
        for table in then.sorted_tables:
            if table.name == "alembic_version" or not (rows := kept.get(table.name)):
                continue
            if table.name == "log_head":  # it has its row from the beginning
                connection.execute(table.delete())
            columns = table.columns.keys()
            connection.execute(table.insert(), [{name: row[name] for name in columns} for row in rows])
    engine.dispose()


def test_totals_of_an_older_log_are_what_its_events_fold_to(older: Settings) -> None:
    schema.upgrade(older.url)
    store = EventStore.open(older)
    store.check()
    totals = {(row.adapter, row.kind): row.num_requests for row in store.queries.usage("alice")}
    assert (
        totals["ad_one", "forward_backward"] >= 1 and sum(n for (_, kind), n in totals.items() if kind == "save") == 4
    )
    with store._read_engine.connect() as connection:
        sessions = {row.id: row.session for row in connection.execute(sa.select(t.adapters.c.id, t.adapters.c.session))}
    assert sessions["ad_one"] is None
    made = {id: session for id, session in sessions.items() if ":" in id}
    assert len(made) >= 3 and all(id.startswith(f"{session}:") for id, session in made.items())
    store.close()
