"""A writer that holds Postgres' append lock and says nothing loses its session; whoever else holds it does not."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import msgspec
import psycopg
import pytest

from tests.support import log
from tinkerbell.config import Settings
from tinkerbell.errors import Unavailable
from tinkerbell.events import stopped
from tinkerbell.events.store import EventStore

pytestmark = pytest.mark.postgres


@pytest.fixture
def store(settings: Settings, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[EventStore]:
    monkeypatch.setattr(stopped, "STOPPED_S", 0.5)
    opened = EventStore.open(msgspec.structs.replace(settings, database_url=postgres_url))
    yield opened
    opened.close()


@contextmanager
def holder(postgres_url: str, name: str) -> Iterator[psycopg.Connection]:
    url = postgres_url.replace("postgresql+psycopg", "postgresql")
    with closing(psycopg.connect(url, application_name=name)) as connection:
        connection.execute("SELECT position FROM log_head FOR UPDATE")
        yield connection


def test_a_silent_writer_loses_its_session(store: EventStore, postgres_url: str) -> None:
    with holder(postgres_url, "tinkerbell writer") as stuck:
        store.append(log.add_lora("ad_a", "alice"))
        with pytest.raises(psycopg.OperationalError):
            stuck.execute("SELECT 1")
    assert store.head() == 1


def test_it_may_have_stopped_within_a_pipeline(store: EventStore, postgres_url: str) -> None:
    """Postgres has read a part of it; its own timeout for idle transactions does not run then."""
    with holder(postgres_url, "tinkerbell writer") as stuck:
        stuck.execute("SET idle_in_transaction_session_timeout = 100")
        stuck.pgconn.enter_pipeline_mode()
        stuck.pgconn.send_query_params(b"UPDATE log_head SET position = 77", None)
        stuck.pgconn.send_flush_request()
        stuck.pgconn.flush()
        store.append(log.add_lora("ad_a", "alice"))
        assert store.head() == 1, "what it was about to write is rolled back"


def test_other_sessions_are_left_alone(store: EventStore, postgres_url: str) -> None:
    with holder(postgres_url, "a migration") as other:
        with pytest.raises(Unavailable):
            store.append(log.add_lora("ad_a", "alice"))
        assert other.execute("SELECT 1").fetchone() == (1,)
        other.rollback()
        store.append(log.add_lora("ad_a", "alice"))
        assert store.head() == 1
