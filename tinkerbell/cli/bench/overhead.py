"""`tinkerbell bench overhead`: what the server adds to an executor that does next to nothing."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec

from tinkerbell.cli.bench import machine
from tinkerbell.cli.bench.client import RawClient, training_body
from tinkerbell.cli.bench.measure import Rate, closed_loop
from tinkerbell.cli.bench.report import Report, below, json_file_option, publish
from tinkerbell.cli.process import ServerProcess

P50_MS = 10.0
COLUMNS = ("clients", "ops_per_s", "p50_ms", "p99_ms", "num_operations")


@click.command()
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="Per row.")
@click.option("--tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Tokens of one request.")
@click.option("--clients", type=click.IntRange(min=1), multiple=True, default=(1, 16, 64), show_default=True)
@json_file_option
def overhead(seconds: float, tokens: int, clients: tuple[int, ...], json_file: Path | None) -> None:
    """Time from HTTP request to future result with the fake executor on SQLite, and requests per second.

    One operation is a small fwdbwd: POST, durable event, batch, result event, long-polled GET. Every client
    has its own adapter and connection and sends its next request when the last is answered.

    \b
    tinkerbell bench overhead
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tinkerbell-bench-") as scratch:
        facts = machine.describe(Path(scratch))
        with ServerProcess(Path(scratch) / "data", ["--executor", "fake"]) as server:
            for num_clients in clients:
                rate = measure(server.url, num_clients, tokens, seconds)
                rows.append({"clients": num_clients, "ops_per_s": rate.per_second, **msgspec.to_builtins(rate)})
    single = [row["p50_ms"] for row in rows if row["clients"] == 1]
    report = Report(
        benchmark="overhead",
        parameters={
            "seconds": seconds,
            "tokens": tokens,
            "executor": "fake",
            "database": "sqlite, durability full",
        },
        machine=facts,
        rows=rows,
        expectations=[below("p50 ms at 1 client", p50, P50_MS) for p50 in single],
    )
    publish(report, COLUMNS, json_file)


def measure(url: str, num_clients: int, tokens: int, seconds: float) -> Rate:
    """The rate of `num_clients` closed-loop clients, each with an adapter of its own."""
    body = training_body(tokens, tokens)
    clients = [RawClient(url) for _ in range(num_clients)]
    try:
        adapters = [client.add_lora(seed) for seed, client in enumerate(clients)]
        operations = [
            partial(_operation, client, f"/v1/adapters/{adapter}/fwdbwd", body)
            for client, adapter in zip(clients, adapters, strict=True)
        ]
        return closed_loop(operations, seconds)
    finally:
        for client in clients:
            client.close()


def _operation(client: RawClient, path: str, body: bytes) -> None:
    client.result(client.post(path, body))
