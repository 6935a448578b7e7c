"""The migrations give the tables of tables.py, on both databases; an old or missing schema is noticed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from tinkerbell.config import Settings
from tinkerbell.errors import InvalidRequest, MissingPackage, SchemaOutdated, Unavailable
from tinkerbell.events import projections, schema
from tinkerbell.events import tables as t
from tinkerbell.events.engine import make_engine, parse_url
from tinkerbell.events.store import EventStore


def test_migrations_give_the_tables(database_url: str) -> None:
    engine = make_engine(database_url, role="reader")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, t.metadata) == []
        # Autogenerate does not compare check constraints and partial indexes.
        inspector = sa.inspect(connection)
        for table in t.metadata.sorted_tables:
            rules = {rule for column in table.columns for rule in column.constraints} | table.constraints
            named = {str(rule.name) for rule in rules if isinstance(rule, sa.CheckConstraint)}
            assert {check["name"] for check in inspector.get_check_constraints(table.name)} == named
            indexes = {index["name"]: index for index in inspector.get_indexes(table.name)}
            for index in table.indexes:
                partial = index.dialect_options[connection.dialect.name]["where"] is not None
                options = indexes[index.name]["dialect_options"]
                assert (f"{connection.dialect.name}_where" in options) == partial
    engine.dispose()


def test_upgrade_twice_is_once(database_url: str) -> None:
    assert schema.is_current(database_url) and not schema.is_empty(database_url)
    schema.upgrade(database_url)
    assert schema.is_current(database_url)


def test_keys_of_the_folds_are_the_tables(settings: Settings) -> None:
    assert {name: tuple(c.name for c in table.primary_key) for name, table in t.PROJECTIONS.items()} == projections.KEYS


def test_a_missing_file_is_empty_and_stays_missing(tmp_path: Path) -> None:
    path = tmp_path / "none" / "x.db"
    url = f"sqlite:///{path}"
    assert schema.is_empty(url) and not schema.is_current(url)
    with pytest.raises(SchemaOutdated, match="tinkerbell db upgrade"):
        EventStore.open(Settings(data_dir=str(tmp_path), database_url=url))
    assert not path.exists()
    schema.upgrade(url)
    assert schema.is_current(url)


def test_an_old_and_a_newer_schema_are_refused(database_settings: Settings) -> None:
    engine = make_engine(database_settings.url, role="writer")
    for revision in ("0000", "9999"):
        with engine.begin() as connection:
            connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{revision}'")
        assert not schema.is_current(database_settings.url)
        with pytest.raises(SchemaOutdated):
            EventStore.open(database_settings)
    with pytest.raises(SchemaOutdated, match="newer"):
        schema.upgrade(database_settings.url)
    engine.dispose()


def test_a_failed_upgrade_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = tmp_path / "migrations"
    shutil.copytree(schema.migrations_dir(), scripts, ignore=shutil.ignore_patterns("__pycache__"))
    broken = scripts / "versions" / "0099_broken.py"
    head = ScriptDirectory(str(scripts)).get_current_head()
    broken.write_text(
        f"from alembic import op\nrevision = '0099'\ndown_revision = '{head}'\n"
        "def upgrade():\n    op.execute('CREATE TABLE half (x INTEGER)')\n    op.execute('nonsense')\n"
    )
    monkeypatch.setattr(schema, "migrations_dir", lambda: scripts)
    url = f"sqlite:///{tmp_path / 'x.db'}"
    with pytest.raises(sa.exc.DatabaseError):
        schema.upgrade(url)
    assert schema.is_empty(url)


def test_urls() -> None:
    assert parse_url("postgres://u@h/d").drivername == "postgresql+psycopg"
    assert parse_url("postgresql://u@h/d").drivername == "postgresql+psycopg"
    assert parse_url("sqlite:///x.db").database == "x.db"
    for bad in ("sqlite://", "sqlite:///:memory:", "mysql://h/d", "nonsense"):
        with pytest.raises(InvalidRequest, match="database URL"):
            parse_url(bad)


def test_no_connection_is_unavailable(tmp_path: Path) -> None:
    url = f"postgresql://postgres@/x?host={tmp_path}"
    with pytest.raises(Unavailable, match=r"cannot be used: .*No such file"):
        EventStore.open(Settings(data_dir=str(tmp_path), database_url=url))
    with pytest.raises(Unavailable, match="does not answer"):
        schema.is_empty(url)
    (tmp_path / "no.db").write_text("this is a letter, not a database " * 100)
    with pytest.raises(Unavailable, match="not a database"):
        EventStore.open(Settings(data_dir=str(tmp_path), database_url=f"sqlite:///{tmp_path / 'no.db'}"))


def test_postgres_without_its_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingPackage, match=r"tinkerbell-server\[postgres\]"):
        make_engine("postgresql://postgres@/x", role="reader")


def test_durability(settings: Settings, postgres_url: str) -> None:
    for durability, level, commit in (("full", 2, "on"), ("relaxed", 1, "off")):
        engine = make_engine(settings.url, role="writer", durability=durability)  # type: ignore[arg-type]
        with engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == level
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        engine.dispose()
        engine = make_engine(postgres_url, role="writer", durability=durability)  # type: ignore[arg-type]
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == commit
        engine.dispose()


def test_events_import_neither_torch_nor_a_server() -> None:
    code = (
        "import sys; import tinkerbell.events.store, tinkerbell.events.futures;"
        "print([m for m in ('torch', 'litestar', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
