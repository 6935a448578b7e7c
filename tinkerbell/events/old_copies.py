"""What a database keeps of rows that were changed: SQLite's write-ahead log and free pages, dead rows of Postgres, and
the segments of its write-ahead log, which it uses again without emptying them."""

from collections.abc import Callable, Sequence

import sqlalchemy as sa

OURS = "tinkerbell: old write-ahead log is written over"
_SEGMENTS = "SELECT name FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$'"


def rewrite(writer: sa.Engine, reader: sa.Engine, tables: Sequence[sa.Table]) -> None:
    """Write the tables anew, so that nothing of what was taken out stays in pages that are free."""
    if writer.dialect.name == "sqlite":
        for statement in ("PRAGMA wal_checkpoint(TRUNCATE)", "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
            outside_of_transactions(writer, statement)
        return
    # Only FULL writes the tables anew: after a plain one dead rows can still be read from the files.
    with reader.connect() as connection:
        for table in tables:
            connection.exec_driver_sql(f"VACUUM (FULL) {table.name}")


def outside_of_transactions(writer: sa.Engine, statement: str) -> None:
    """Run what SQLite runs in no transaction."""
    raw = writer.raw_connection()
    try:
        raw.driver_connection.execute(statement).fetchall()  # type: ignore[union-attr]
    finally:
        raw.close()


def write_over_wal(reader: sa.Engine, tell: Callable[[float, float], None]) -> str | None:
    """Have Postgres write over every segment of its write-ahead log that was written before, or remove it. Why some of
    them may be there still; None where there are none, as always on SQLite, whose log was truncated.

    It takes a role that may checkpoint, switch segments and list them: a superuser, or one with pg_checkpoint,
    pg_monitor, and EXECUTE on pg_switch_wal.
    """
    if reader.dialect.name == "sqlite":
        return None
    try:
        with reader.connect() as connection:

            def one(query: str) -> str:
                return str(connection.exec_driver_sql(query).scalar_one())

            current = "pg_walfile_name(pg_current_wal_insert_lsn())"
            last = one(f"SELECT {current}")
            _switch(connection)
            # What is behind the checkpoint is removed, or renamed to be used again, with what is in it.
            connection.exec_driver_sql("CHECKPOINT")
            waiting = int(one(f"SELECT count(*) FROM ({_SEGMENTS}) s WHERE name > {current}"))
            for number in range(waiting + 1):
                tell(number, waiting + 1)
                # A switch fills the rest of its segment with empty pages.
                _switch(connection)
            connection.exec_driver_sql("CHECKPOINT")
            kept = int(one(f"SELECT count(*) FROM ({_SEGMENTS}) s WHERE name <= '{last}'"))
    except sa.exc.DBAPIError as exc:
        return f"the database's role may not do what that takes ({str(exc.orig).splitlines()[0]})"
    return f"Postgres keeps {kept} segments for a replica, an archive or `wal_keep_size`" if kept else None


def _switch(connection: sa.Connection) -> None:
    connection.execute(sa.text("SELECT pg_logical_emit_message(false, 'tinkerbell', :text)"), {"text": OURS})
    connection.exec_driver_sql("SELECT pg_switch_wal()")
