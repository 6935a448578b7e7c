"""The database's schema: is it there, is it this release's, bring it there."""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from tinkerbell.errors import SchemaOutdated
from tinkerbell.events.engine import make_engine, parse_url, sqlite_path
from tinkerbell.files import make_directory, open_private

UPGRADE_LOCK = 0x74696E6B
"""Key of the Postgres advisory lock that keeps two upgrades apart."""


def migrations_dir() -> Path:
    """Where the migration scripts are: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def upgrade(url: str) -> None:
    """Bring the database to this release's schema, in one transaction; make the SQLite file if there is none.

    Raises SchemaOutdated when the database is newer than this release.
    """
    path = sqlite_path(parse_url(url))
    if path is not None:
        make_directory(path.parent)
        # SQLite gives its other files the mode of this one.
        open_private(path, "ab").close()
    engine = make_engine(url, role="writer")
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(UPGRADE_LOCK)))
            scripts = ScriptDirectory(str(migrations_dir()))
            known = {script.revision for script in scripts.walk_revisions()}
            ahead = set(_heads(connection)) - known
            if ahead:
                raise SchemaOutdated(f"the database has revision {', '.join(ahead)}, made by a newer release than this")
            migrate(connection)
    finally:
        engine.dispose()


def migrate(connection: sa.Connection, revision: str = "head") -> None:
    """Run the migrations that are missing up to this one, in the connection's transaction."""
    config = Config()
    config.set_main_option("script_location", str(migrations_dir()).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def is_current(url: str) -> bool:
    """Whether the schema is exactly this release's."""
    if _is_missing_file(url):
        return False
    engine = make_engine(url, role="reader")
    try:
        with engine.connect() as connection:
            heads = set(_heads(connection))
    finally:
        engine.dispose()
    return heads == set(ScriptDirectory(str(migrations_dir())).get_heads())


def is_empty(url: str) -> bool:
    """Whether the database has no tables at all."""
    if _is_missing_file(url):
        return True
    engine = make_engine(url, role="reader")
    try:
        return not sa.inspect(engine).get_table_names()
    finally:
        engine.dispose()


def _is_missing_file(url: str) -> bool:
    """Connecting would make the file: asking must not."""
    path = sqlite_path(parse_url(url))
    return path is not None and not path.exists()


def _heads(connection: sa.Connection) -> tuple[str, ...]:
    return MigrationContext.configure(connection).get_current_heads()
