"""Through a real server with a real model: what a tenant gets is the same alone and among others, bit for bit."""

import random
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_model import write_tiny_model
from tinkerbell import wire
from tinkerbell.cli.process import ServerProcess
from tinkerbell.config import Settings
from tinkerbell.events.kinds import BatchPlanned
from tinkerbell.events.store import EventStore
from tinkerbell.sdk import Client, supervised

STEPS = 3
TENANTS: list[dict[str, Any]] = [
    {"rank": 8, "alpha": 16.0, "targets": ["q_proj", "v_proj"]},
    {"rank": 16, "alpha": 32.0, "targets": ["all-linear"]},
    {"rank": 5, "alpha": 7.0, "targets": ["o_proj", "mlp"]},
    {"rank": 3, "alpha": 3.0, "targets": ["all-linear", "unembed"]},
]


def data(number: int, step: int) -> list[wire.DatumBody]:
    draw = random.Random(100 * number + step)
    lengths = [draw.randrange(2, 60) for _ in range(draw.randrange(1, 5))]
    return [supervised([draw.randrange(1, 120) for _ in range(length)]) for length in lengths]


def train(url: str, number: int, pause_s: float) -> list[Any]:
    """Everything tenant `number` gets to see, its requests being sent without waiting for results."""
    draw = random.Random(number)
    with Client(url) as client:
        adapter = client.add_lora(seed=number, **TENANTS[number])
        futures: list[Any] = []
        for step in range(STEPS):
            # Two requests for each step, so that some meet in one batch and some do not.
            futures += [adapter.forward_backward(data(number, step)), adapter.forward_backward(data(number, 50 + step))]
            futures.append(adapter.forward(data(number, 90 + step)))
            time.sleep(pause_s * draw.random())
            futures.append(adapter.optim_step(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=1.0))
        futures.append(adapter.sample([1, 2, 3], max_tokens=12, num_samples=3, temperature=0.8, seed=number))
        return [seen(future.result()) for future in futures]


def seen(result: Any) -> Any:
    match result:
        case wire.ForwardBackwardResult():
            return result.loss, result.metrics, result.logprobs
        case wire.OptimStepResult():
            return result.step, result.grad_norm, result.state_digest
        case wire.SampleResult():
            return [(sequence.tokens, sequence.logprobs) for sequence in result.sequences]
    raise AssertionError(result)


def most_company(data_dir: Path) -> int:
    """The largest number of adapters that were in one batch."""
    with closing(EventStore.open(Settings(data_dir=str(data_dir)))) as store:
        adapter_of = {event.position: event.adapter for event in store.read(limit=10_000)}
        batches = [event.event for event in store.read(limit=10_000, types=["batch.planned"])]
    return max(
        len({adapter_of[unit.request] for unit in batch.units})
        for batch in batches
        if isinstance(batch, BatchPlanned) and batch.lane == "train"
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_four_clients_at_once_get_what_each_gets_alone(tmp_path: Path, threads: int) -> None:
    model = write_tiny_model(tmp_path / "model")
    environment = {
        "TINKERBELL_THREADS": str(threads),
        "TINKERBELL_CHUNK_TOKENS": "64",
        "TINKERBELL_BATCH_TOKENS": "400",
    }
    options = ["--model", str(model)]
    with ServerProcess(tmp_path / "together", options, environment=environment) as server:
        together: dict[int, list[Any]] = {}

        def client(number: int) -> None:
            together[number] = train(server.url, number, pause_s=0.05)

        clients = [threading.Thread(target=client, args=(number,)) for number in range(len(TENANTS))]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(120)
    assert sorted(together) == list(range(len(TENANTS)))
    assert most_company(tmp_path / "together") >= 3, "else this shows nothing"
    with ServerProcess(tmp_path / "alone", options, environment=environment) as server:
        for number in range(len(TENANTS)):
            assert train(server.url, number, pause_s=0.0) == together[number], f"tenant {number}"
