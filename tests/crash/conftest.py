"""Databases by the dozen, and what an undisturbed run looks like."""

import itertools
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from tests.crash import lives
from tests.crash.lives import NUM_STEPS, Counted, MakeSettings
from tinkerbell.cli.bench.postgres import ScratchPostgres
from tinkerbell.config import Settings


def sqlite_maker(directory: Path, template: Path) -> MakeSettings:
    """Makes a data directory with a database of its own, each time."""
    numbers = itertools.count()

    def make() -> Settings:
        data_dir = directory / f"data-{next(numbers)}"
        data_dir.mkdir()
        shutil.copyfile(template, data_dir / "tinkerbell.db")
        return Settings(data_dir=str(data_dir), executor="fake")

    return make


@pytest.fixture
def make_sqlite(tmp_path: Path, sqlite_template: Path) -> MakeSettings:
    return sqlite_maker(tmp_path, sqlite_template)


@pytest.fixture(scope="session")
def counted(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Counted:
    """With the fake executor. Which lines there are and what is answered does not depend on the database."""
    directory = tmp_path_factory.mktemp("counted")
    return lives.count(sqlite_maker(directory, sqlite_template), directory / "counts", num_steps=NUM_STEPS)


@pytest.fixture
def make_postgres(make_sqlite: MakeSettings, postgres: ScratchPostgres) -> Iterator[MakeSettings]:
    numbers = itertools.count()
    one_at_a_time = threading.Lock()
    admin = sa.create_engine(postgres.url(), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    made: list[str] = []

    def make() -> Settings:
        with one_at_a_time, admin.connect() as connection:
            made.append(f"crash_{next(numbers)}")
            connection.exec_driver_sql(f"CREATE DATABASE {made[-1]}")
            return msgspec.structs.replace(make_sqlite(), database_url=postgres.url(made[-1]))

    yield make
    with admin.connect() as connection:
        for name in made:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Says how far it is, past pytest's capture: the whole takes minutes."""

    def say(text: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n  {text}")
            sys.stdout.flush()

    return say
