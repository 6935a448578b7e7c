"""A server that was stopped or killed in the middle answers everything it ever accepted as if undisturbed."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.server import client_of, fake_server
from tests.support.waiting import PATIENCE_S, eventually
from tinkerbell.cli.main import run
from tinkerbell.sdk import Adapter, Client, Datum

NUM_ADAPTERS = 3
NUM_STEPS = 5
LONG_LEASE = {"TINKERBELL_LEASE_TTL_S": "300"}
"""A killed server keeps nobody on its machine waiting: with this, waiting would be a failure."""


def data(adapter: int, step: int) -> list[Datum]:
    tokens = [(7 * adapter + 3 * step + i) % 50 + 1 for i in range(12)]
    return [Datum(tokens=tokens[:-1], targets=tokens[1:])]


def ask(client: Client) -> tuple[list[Adapter], list[list[int]]]:
    """Send everything without waiting for anything but the adapters; ids of the futures, by adapter."""
    adapters = [client.add_lora(rank=4, seed=seed) for seed in range(NUM_ADAPTERS)]
    futures: list[list[int]] = [[] for _ in adapters]
    for step in range(NUM_STEPS):
        for index, adapter in enumerate(adapters):
            futures[index].append(adapter.forward_backward(data(index, step)).id)
            futures[index].append(adapter.optim_step(learning_rate=0.05).id)
    return adapters, futures


def outcomes(client: Client, futures: Sequence[Sequence[int]]) -> list[list[object]]:
    """What each adapter was answered, in order: losses and logprobs, steps and state digests."""
    return [[client.future(id).result(timeout=PATIENCE_S) for id in of_adapter] for of_adapter in futures]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[list[object]]:
    with fake_server(tmp_path_factory.mktemp("undisturbed")) as server, client_of(server) as client:
        return outcomes(client, ask(client)[1])


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_restart_continues(how: str, tmp_path: Path, undisturbed: list[list[object]]) -> None:
    with (
        fake_server(tmp_path, latency_us=100_000, environment=LONG_LEASE) as server,
        client_of(server) as client,
    ):
        adapters, futures = ask(client)
        eventually(lambda: client.future(futures[0][3]).done())
        if how == "SIGTERM":
            server.terminate()
            assert server.wait(PATIENCE_S) == 0, server.log_tail()
        else:
            server.kill()

    with fake_server(tmp_path, environment=LONG_LEASE) as server, client_of(server) as client:
        assert outcomes(client, futures) == undisturbed
        # An adapter goes on from where it was: one more step is step NUM_STEPS + 1.
        again = client.adapter(adapters[0].id)
        again.forward_backward(data(0, NUM_STEPS))
        assert again.optim_step(learning_rate=0.05).result(timeout=PATIENCE_S).step == NUM_STEPS + 1
    assert run(["audit", "verify", "--data-dir", str(tmp_path)]) == 0


def test_killed_server_left_work_pending(tmp_path: Path) -> None:
    """The other tests say nothing unless the disturbed server really had unanswered requests."""
    with (
        fake_server(tmp_path, latency_us=100_000, environment=LONG_LEASE) as server,
        client_of(server) as client,
    ):
        _, futures = ask(client)
        server.kill()
    with fake_server(tmp_path, "--role", "api") as server, client_of(server) as client:
        assert any(not client.future(id).done() for of_adapter in futures for id in of_adapter)


def test_two_servers_on_one_file(tmp_path: Path, undisturbed: list[list[object]]) -> None:
    first = fake_server(tmp_path, latency_us=50_000, environment=LONG_LEASE)
    second = fake_server(tmp_path, environment=LONG_LEASE)
    with first, second, client_of(first) as one, client_of(second) as other:
        _, futures = ask(one)
        # Asked through the second server, computed by the first, which holds the lease.
        assert other.future(futures[0][0]).result(timeout=PATIENCE_S) == undisturbed[0][0]
        first.kill()
        # The second takes over, whose holder it sees is gone.
        assert outcomes(other, futures) == undisturbed
    assert run(["audit", "verify", "--data-dir", str(tmp_path)]) == 0
