"""Questions, as many at a time as there are threads."""

from datetime import UTC, datetime
from multiprocessing.synchronize import Event

from tinkerbell.cli.bench.attacks.target import Caller, Target


def _ask(target: Target, stop: Event, *paths: str) -> None:
    caller = Caller(target)
    while not stop.is_set():
        for path in paths:
            caller.call("GET", path)


def runs(target: Target, stop: Event) -> None:
    """GET /v1/runs of a tenant that had many."""
    _ask(target, stop, "/v1/runs")


def lists(target: Target, stop: Event) -> None:
    """All other lists, of both protocols."""
    _ask(
        target,
        stop,
        "/v1/adapters",
        "/v1/checkpoints?limit=1000",
        "/v1/usage",
        "/v1/queue",
        f"/v1/runs/{target.run}",
        "/api/v1/training_runs?limit=1000",
        "/api/v1/checkpoints?limit=1000",
        "/api/v1/sessions?limit=1000",
        "/api/v1/billing/usage/checkpoints/current",
    )


def far_offsets(target: Target, stop: Event) -> None:
    """The last pages of lists."""
    _ask(target, stop, "/v1/adapters?offset=1000000", "/api/v1/training_runs?offset=1000000")


def audit(target: Target, stop: Event) -> None:
    """The audit log of today."""
    _ask(target, stop, f"/api/v1/audit?day={datetime.now(UTC).date().isoformat()}")


def session_search(target: Target, stop: Event) -> None:
    """A search for what no session has."""
    caller = Caller(target)
    body = b'{"owner": {"type": "all"}, "limit": 100, "display_name": "no such name"}'
    while not stop.is_set():
        caller.call("POST", "/api/v1/sessions/search", body)


def whole_log(target: Target, stop: Event) -> None:
    """The events of the whole log, read from its beginning again and again."""
    while not stop.is_set():
        try:
            with target.connection() as connection:
                connection.sendall(target.head("GET", "/v1/events?after=0"))
                connection.settimeout(1.0)
                while not stop.is_set() and connection.recv(1 << 20):
                    pass
        except OSError:
            continue
