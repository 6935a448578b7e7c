"""What an answer costs does not depend on how long the log is: every route that reads, on a log and on one of twenty
times its length.

The measure is the work of the database: statements, rows that it gives, and steps of its machine, which are the same in
each run. A row that is counted in an index takes a few steps; one that is loaded takes dozens.
"""

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.api_driver import ApiDriver, record_environment
from tinkerbell.api import auth
from tinkerbell.cli.bench.long_log import Life, LongLog
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore

TENANT = "alice"
SHORT, LONG = 12, 240
"""Programs in the log: each a session with a model that was trained, saved and removed."""

STEPS_PER_ROW = 12
"""Of the database's machine: what a row more in an index may take where a total is asked for."""

QUERY = {
    "/v1/adapters": {"limit": 5},
    "/v1/futures": {"limit": 1},
    "/v1/runs": {"limit": 5},
    "/v1/checkpoints": {"limit": 5},
    "/v1/usage": {"limit": 5},
    "/v1/adapters/{adapter_id}/checkpoints": {"limit": 5},
    "/v1/runs/{adapter_id}": {"limit": 5},
    "/api/v1/training_runs": {"limit": 5},
    "/api/v1/checkpoints": {"limit": 5},
    "/api/v1/sessions": {"limit": 5},
    "/api/v1/audit": {"day": "2020-02-02"},
    "/api/v1/billing/usage/events": {"starting_on": "2020-02-02T00:00:00Z", "ending_before": "2020-02-03T00:00:00Z"},
}
ENDLESS = {"/v1/events"}
"""A stream: it is asked of in test_api_streams."""

POSTS = {
    "/v1/adapters": {},
    "/api/v1/sessions/search": {"owner": {"type": "all"}, "limit": 5},
    "/api/v1/weights_info": {"tinker_path": "tinker://{run_id}/weights/final"},
    "/api/v1/get_info": {"model_id": "{run_id}"},
}
"""Of the other routes those that look through what is there; {...} as in paths."""


class Work:
    """What the reading side of a store asks of its database."""

    def __init__(self, engine: sa.Engine) -> None:
        self.begin()
        engine.dispose()
        sa.event.listen(engine, "do_connect", self._connect)
        sa.event.listen(engine, "connect", self._watch)
        sa.event.listen(engine, "before_cursor_execute", self._count)

    def begin(self) -> None:
        self.steps = self.statements = self.rows = 0

    def _connect(self, _dialect: Any, _record: Any, _args: Any, options: dict[str, Any]) -> None:
        work = self

        class Cursor(sqlite3.Cursor):
            def fetchall(self) -> list[Any]:
                rows = super().fetchall()
                work.rows += len(rows)
                return rows

            def fetchone(self) -> Any:
                row = super().fetchone()
                work.rows += row is not None
                return row

            def fetchmany(self, size: int | None = 1) -> list[Any]:
                rows = super().fetchmany(size)
                work.rows += len(rows)
                return rows

        class Connection(sqlite3.Connection):
            def cursor(self, factory: Any = None) -> Any:
                return super().cursor(Cursor)

        options["factory"] = Connection

    def _watch(self, connection: Any, _record: Any) -> None:
        connection.set_progress_handler(self._step, 10)

    def _step(self) -> int:
        self.steps += 10
        return 0

    def _count(self, *_: Any) -> None:
        self.statements += 1


@contextmanager
def an_hour_ago(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What happens now happens then: the queue shows what was done within a minute."""
    now = time.time_ns
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: now() - 3600 * 10**9)
        yield


def routes(api: ApiDriver) -> Iterator[str]:
    """Paths of every GET of both protocols, with {names} in them."""
    for route in api.app.routes:
        if "GET" in getattr(route, "methods", ()) and route.path.startswith(("/v1", "/api/v1")):
            yield re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)


def test_the_cost_of_an_answer_does_not_grow_with_the_log(
    settings: Settings, sqlite_store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether a key is asked for again is a matter of time, not of the log.
    monkeypatch.setattr(auth, "CACHE_TTL_S", 3600.0)
    record_environment(sqlite_store)
    log = LongLog(sqlite_store)
    with ApiDriver(settings, sqlite_store) as api:
        with an_hour_ago(monkeypatch):
            (first,) = log.fill(TENANT, 1, 12)
            log.fill(TENANT, SHORT - 1, 2)
        names = named(api, first)
        work = Work(sqlite_store._read_engine)
        asked = [("GET", path) for path in routes(api) if path not in ENDLESS] + [("POST", path) for path in POSTS]
        short = {key: cost(api, work, *key, names) for key in asked}
        with an_hour_ago(monkeypatch):
            log.fill(TENANT, LONG - SHORT, 2)
        long = {key: cost(api, work, *key, names) for key in asked}
    grown = {
        " ".join(key): (short[key], long[key])
        for key in asked
        if long[key][0] > short[key][0] + STEPS_PER_ROW * (LONG - SHORT)
        or long[key][1] > short[key][1]
        or long[key][2] > short[key][2]
    }
    assert not grown, f"(steps, statements, rows) on a log and on a long one: {grown}"


def named(api: ApiDriver, life: Life) -> dict[str, str]:
    """What stands for each {name} in a path; a route with another one adds it here."""
    return {
        "adapter_id": life.model,
        "run_id": life.model,
        "session_id": life.session,
        "sampler_id": life.sampler,
        "checkpoint_id": f"ck_{life.session[3:]}",
        "future_id": str(api.submit("/v1/adapters", TENANT)["id"]),
        "kind": "weights",
        "name": "final",
        "ticket": "none",
    }


def cost(api: ApiDriver, work: Work, method: str, path: str, names: dict[str, str]) -> tuple[int, int, int]:
    """(steps, statements, rows) of one call, after one that fills what is remembered."""
    for _ in range(2):
        work.begin()
        if method == "GET":
            answered = api.get(path.format(**names), TENANT, params=QUERY.get(path))
        else:
            body = {key: text.format(**names) if isinstance(text, str) else text for key, text in POSTS[path].items()}
            answered = api.post(path, TENANT, body)
        assert answered.status_code < 500 and answered.status_code != 429, (path, answered.text)
    return work.steps, work.statements, work.rows
