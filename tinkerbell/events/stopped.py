"""Writers on Postgres that were stopped in a transaction hold the append lock: who waits for it ends their session.

Postgres' own idle_in_transaction_session_timeout is not enough: it does not run once the first message of a pipeline
was read and the rest does not come. With SQLite the lock is the kernel's: only the stopped process can give it up.
"""

import logging
from typing import Any

import sqlalchemy as sa

log = logging.getLogger(__name__)

STOPPED_S = 5.0
"""How long others wait for the append lock, and how long its holder may leave Postgres without a word. What a writer
says in a transaction follows within milliseconds."""

_NAME = "tinkerbell writer"
_LOCK_NOT_AVAILABLE = "55P03"
_END = sa.text(
    """
    SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND usename = current_user AND application_name = :name
      AND pid <> pg_backend_pid() AND backend_xid IS NOT NULL AND wait_event = 'ClientRead'
      AND state_change < clock_timestamp() - make_interval(secs => :stopped_s)
    """
)


def expect(engine: sa.Engine) -> None:
    """Let the connections of this writer be told from others and wait for a lock no longer than STOPPED_S. Nothing to
    do for SQLite."""
    if engine.dialect.name != "postgresql":
        return

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.execute(f"SET application_name = '{_NAME}'")
        connection.execute(f"SET lock_timeout = {int(STOPPED_S * 1000)}")
        connection.commit()


def is_suspected(exc: BaseException) -> bool:
    """Whether this says that a lock was waited for in vain."""
    return getattr(getattr(exc, "orig", exc), "sqlstate", None) == _LOCK_NOT_AVAILABLE


def end(engine: sa.Engine) -> None:
    """End the sessions of stopped writers; what they were about to write is rolled back."""
    with engine.begin() as connection:
        for pid, ended in connection.execute(_END, {"name": _NAME, "stopped_s": STOPPED_S}):
            if ended:
                log.warning("ended the Postgres session of a stopped writer pid=%d", pid)
