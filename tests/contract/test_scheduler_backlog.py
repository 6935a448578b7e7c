"""What a new leader reads: in a few statements however much waits, and without the bodies. On SQLite and Postgres."""

from typing import Any

import sqlalchemy as sa

from tests.support import log
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.startup import read_backlog


def test_what_waits_is_read_in_a_few_statements_and_without_bodies(store: EventStore) -> None:
    statements: list[str] = []

    def count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    def read(num_more: int) -> int:
        store.append(*(log.sample(None, "alice") for _ in range(num_more)))
        statements.clear()
        backlog = read_backlog(store)
        assert [request.position for request in backlog.requests] == [row.id for row in store.queries.pending()]
        assert all(request.body is None and request.body_codec for request in backlog.requests)
        return len(statements)

    sa.event.listen(store._read_engine, "before_cursor_execute", count)
    assert read(2) == read(200)
