"""Real server processes on the fake executor, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.waiting import eventually as eventually
from tinkerbell.cli.process import ServerProcess
from tinkerbell.sdk import Client
from tinkerbell.sdk.retry import RetryPolicy

NO_RETRY = RetryPolicy(give_up_after_s=0.0)


def fake_server(
    data_dir: Path, *options: str, latency_us: int = 0, environment: dict[str, str] | None = None
) -> ServerProcess:
    """A server that was not started yet. `latency_us`: what every batch takes at least."""
    slow = ("--executor-option", f"latency_us={latency_us}") if latency_us else ()
    return ServerProcess(data_dir, ["--executor", "fake", *slow, *options], environment=environment)


@contextmanager
def fake_client(data_dir: Path, *options: str, latency_us: int = 0) -> Iterator[Client]:
    """A started server, and a client without a key that does not retry."""
    with fake_server(data_dir, *options, latency_us=latency_us) as server, client_of(server) as client:
        yield client


def client_of(server: ServerProcess, key: str | None = None) -> Client:
    """A client that reports every failure at once."""
    return Client(server.url, key, retry=NO_RETRY)
