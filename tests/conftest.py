"""Fixtures of every test: a database that is thrown away, settings for it, an open store."""

import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from tinkerbell.cli.bench.postgres import ScratchPostgres, scratch_postgres
from tinkerbell.config import Settings
from tinkerbell.events import schema
from tinkerbell.events.store import EventStore

pytest_plugins = ["tests.support.slices"]

_numbers = count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[ScratchPostgres]:
    """A Postgres server for this run. Without the binaries the test fails: a database nobody tests does not work."""
    with scratch_postgres(durable=False) as server:
        schema.upgrade(server.url("template1"))
        yield server


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An up-to-date SQLite file to copy."""
    path = tmp_path_factory.mktemp("template") / "empty.db"
    schema.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def settings(tmp_path: Path, sqlite_template: Path) -> Settings:
    """A fresh SQLite database, up to date, in a data directory of its own; the fake executor."""
    data_dir = tmp_path / "data"
    data_dir.mkdir(0o700)
    shutil.copy(sqlite_template, data_dir / "tinkerbell.db")
    return Settings(data_dir=str(data_dir), executor="fake")


@pytest.fixture
def postgres_url(postgres: ScratchPostgres) -> Iterator[str]:
    """A fresh Postgres database, up to date."""
    name = f"test_{next(_numbers)}"
    admin = sa.create_engine(postgres.url(), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield postgres.url(name)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh database, up to date: the test runs once on SQLite and once on Postgres."""
    if request.param == "postgres":
        url: str = request.getfixturevalue("postgres_url")
        return url
    return str(request.getfixturevalue("settings").url)


@pytest.fixture
def database_settings(settings: Settings, database_url: str) -> Settings:
    """`settings` on each database in turn."""
    return msgspec.structs.replace(settings, database_url=database_url)


@pytest.fixture
def store(database_settings: Settings) -> Iterator[EventStore]:
    """An open store on each database in turn."""
    opened = EventStore.open(database_settings)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_store(settings: Settings) -> Iterator[EventStore]:
    """An open store on SQLite only, for what does not depend on the database."""
    opened = EventStore.open(settings)
    yield opened
    opened.close()
