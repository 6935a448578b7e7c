"""Connections to the one database, set up alike on SQLite and Postgres."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from tinkerbell.config import normalise_url
from tinkerbell.errors import InvalidRequest, MissingPackage, Unavailable

BUSY_TIMEOUT_MS = 30_000
"""How long a SQLite connection waits for another process's write."""


def _identity(value: Any) -> Any:
    """JSON columns carry canonical text, made and read by codec.py."""
    return value.decode() if isinstance(value, bytes) else value


def parse_url(url: str) -> sa.URL:
    """The URL, checked. Raises InvalidRequest for what is neither a SQLite file nor Postgres."""
    try:
        parsed = sa.make_url(normalise_url(url))
    except sa.exc.ArgumentError as exc:
        raise InvalidRequest(f"database URL: {exc}") from exc
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise InvalidRequest("database URL: SQLite needs a file, as in sqlite:///tinkerbell.db")
        return parsed.set(drivername="sqlite")
    if parsed.get_backend_name() == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise InvalidRequest(f"database URL: {parsed.get_backend_name()} is not supported, only sqlite and postgresql")


def sqlite_path(url: sa.URL) -> Path | None:
    """The file of a SQLite URL; None for Postgres."""
    return Path(url.database or "") if url.get_backend_name() == "sqlite" else None


def make_engine(
    url: str, *, role: Literal["writer", "reader"], durability: Literal["full", "relaxed"] = "full"
) -> sa.Engine:
    """An engine whose transactions are the caller's: `writer` begins with the write lock on SQLite, `reader` runs
    each statement on its own unless inside `snapshot`.

    Raises InvalidRequest for an unusable URL, MissingPackage without the driver. What a reader's statements raise
    when there is no database is Unavailable.
    """
    parsed = parse_url(url)
    # Parameters are tenants' data: they do not belong in error messages.
    options: dict[str, Any] = {
        "json_serializer": _identity,
        "json_deserializer": _identity,
        "hide_parameters": True,
    }
    if role == "writer":
        options |= {"pool_size": 1, "max_overflow": 0}
    else:
        options |= {"pool_size": 8, "max_overflow": 24}
    if parsed.get_backend_name() == "sqlite":
        # Nothing to reset: a writer ends its transactions, a reader has none.
        engine = sa.create_engine(parsed, poolclass=sa.QueuePool, pool_reset_on_return=None, **options)
        _prepare_sqlite(engine, role, durability)
    else:
        if role == "reader":
            options["isolation_level"] = "AUTOCOMMIT"
        try:
            engine = sa.create_engine(parsed, pool_pre_ping=True, **options)
        except ModuleNotFoundError as exc:
            raise MissingPackage("Postgres needs: pip install 'tinkerbell-server[postgres]'") from exc
        if role == "writer":
            _prepare_postgres(engine, durability)
    if role == "reader":
        _name_outages(engine)
    return engine


def _name_outages(engine: sa.Engine) -> None:
    """Readers get Unavailable where the database does not answer. The driver's text is its cause: it can name hosts,
    which are none of an HTTP caller's business."""

    @sa.event.listens_for(engine, "handle_error", retval=True)
    def handle(context: sa.engine.ExceptionContext) -> Exception | None:
        # A failed ping is how the pool finds out that it must connect again.
        if isinstance(context.sqlalchemy_exception, sa.exc.OperationalError) and not context.is_pre_ping:
            return Unavailable("the database does not answer")
        return None


def _prepare_sqlite(engine: sa.Engine, role: str, durability: str) -> None:
    pragmas = [f"busy_timeout={BUSY_TIMEOUT_MS}"]
    if role == "writer":
        # In WAL mode NORMAL does not sync at commit: the last acknowledged events could be lost with the power.
        level = "FULL" if durability == "full" else "NORMAL"
        pragmas += ["journal_mode=WAL", f"synchronous={level}", "foreign_keys=ON"]
        # Copying the WAL back stalls the commit that does it by several syncs: seldom, and with the pages in memory.
        pragmas += ["wal_autocheckpoint=8192", "cache_size=-65536"]
    else:
        pragmas += ["query_only=ON"]

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        # The driver's own BEGIN is deferred, and two deferred transactions that both write deadlock.
        connection.isolation_level = None
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    if role == "writer":

        @sa.event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")


def _prepare_postgres(engine: sa.Engine, durability: str) -> None:
    value = "on" if durability == "full" else "off"

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.execute(f"SET synchronous_commit = {value}")
        connection.commit()


@contextmanager
def snapshot(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection of a reader engine on which every statement sees the same state of the database."""
    with engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN")
            try:
                yield connection
            finally:
                connection.exec_driver_sql("ROLLBACK")
        else:
            with connection.execution_options(isolation_level="REPEATABLE READ").begin():
                yield connection
