"""A log of an older release is upgraded to what its events fold to. On SQLite and Postgres."""

import pytest
import sqlalchemy as sa

from tests.support.life import live
from tinkerbell.cli.bench.long_log import LongLog
from tinkerbell.config import Settings
from tinkerbell.events import schema
from tinkerbell.events import tables as t
from tinkerbell.events.engine import make_engine
from tinkerbell.events.store import EventStore


@pytest.fixture
def older(database_settings: Settings) -> Settings:
    """A log as it was before totals were kept."""
    store = EventStore.open(database_settings)
    live(store)
    LongLog(store).fill("alice", 3, 2)
    store.check()
    store.close()
    engine = make_engine(database_settings.url, role="writer")
    with engine.begin() as connection:
        for table in ("totals", "bills", "lines", "stored"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
        indexes = {name for name in NEW if not name.startswith(("ix_totals", "ix_bills"))}
        for name in sorted(indexes):
            connection.exec_driver_sql(f"DROP INDEX {name}")
        connection.exec_driver_sql("ALTER TABLE adapters DROP COLUMN session")
        connection.exec_driver_sql("ALTER TABLE futures DROP COLUMN reserved_tokens")
        for name in ("adapter_bytes", "sessions", "samplers", "checkpoints", "stored_bytes"):
            connection.exec_driver_sql(f"ALTER TABLE tenants DROP COLUMN max_{name}")
        for name, (table, column) in OLD.items():
            connection.exec_driver_sql(f"CREATE INDEX {name} ON {table} ({column})")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0006'")
    engine.dispose()
    return database_settings


OLD = {
    "ix_futures_done_us": ("futures", "done_us"),
    "ix_adapters_tenant": ("adapters", "tenant"),
    "ix_sessions_tenant": ("sessions", "tenant"),
}
NEW = {
    *("ix_events_audited", "ix_futures_tenant_done_us", "ix_usage_tenant_hour_us"),
    *("ix_adapters_session", "ix_adapters_tenant_created_us_id", "ix_adapters_models", "ix_adapters_living"),
    *("ix_checkpoints_saved", "ix_checkpoints_saved_of_adapter", "ix_checkpoints_named"),
    *("ix_checkpoints_kept", "ix_checkpoints_kept_of_adapter", "ix_sessions_tenant_created_us_id", "ix_sessions_open"),
    *("ix_sessions_open_of_tenant", "ix_checkpoints_recovery"),
}


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
