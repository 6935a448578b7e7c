"""Closed loops of clients, in threads or in one event loop, and the numbers made of them."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec

Operation = Callable[[], None]
AsyncOperation = Callable[[], Awaitable[None]]


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """What some closed-loop clients got done together."""

    num_clients: int
    seconds: float
    """Measured time, the warm-up not included."""
    num_operations: int
    per_second: float
    p50_ms: float
    p99_ms: float


def percentile(sorted_values: Sequence[float], fraction: float) -> float:
    """Nearest-rank percentile of values in ascending order."""
    assert sorted_values
    rank = max(1, -(-len(sorted_values) * fraction // 1))
    return sorted_values[int(rank) - 1]


def closed_loop(operations: Sequence[Operation], seconds: float, *, warmup_s: float = 0.5) -> Rate:
    """Run each operation again and again in a thread of its own; count those that end in the measured time.

    The first failure of any of them ends all and is raised.
    """
    spans: list[list[tuple[float, float]]] = [[] for _ in operations]
    failures: list[BaseException] = []
    stop = threading.Event()

    def client(index: int, operation: Operation) -> None:
        try:
            while not stop.is_set():
                began = time.perf_counter()
                operation()
                spans[index].append((began, time.perf_counter()))
        except BaseException as exc:  # noqa: BLE001  # handed to the caller's thread below
            failures.append(exc)
            stop.set()

    threads = [threading.Thread(target=client, args=pair, daemon=True) for pair in enumerate(operations)]
    for thread in threads:
        thread.start()
    stop.wait(warmup_s)
    begin = time.perf_counter()
    stop.wait(seconds)
    end = time.perf_counter()
    stop.set()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return _rate(spans, begin, end)


async def closed_loop_async(operations: Sequence[AsyncOperation], seconds: float, *, warmup_s: float = 0.5) -> Rate:
    """`closed_loop` with coroutines of the running event loop in the place of threads."""
    spans: list[list[tuple[float, float]]] = [[] for _ in operations]
    stop = asyncio.Event()

    async def client(index: int, operation: AsyncOperation) -> None:
        while not stop.is_set():
            began = time.perf_counter()
            await operation()
            spans[index].append((began, time.perf_counter()))

    async with asyncio.TaskGroup() as group:
        for pair in enumerate(operations):
            group.create_task(client(*pair))
        await asyncio.sleep(warmup_s)
        begin = time.perf_counter()
        await asyncio.sleep(seconds)
        end = time.perf_counter()
        stop.set()
    return _rate(spans, begin, end)


def _rate(spans: Sequence[Sequence[tuple[float, float]]], begin: float, end: float) -> Rate:
    latencies = sorted(done - began for client_spans in spans for began, done in client_spans if begin <= done < end)
    if not latencies:
        raise TimeoutError(f"no operation ended within {end - begin:g} s")
    return Rate(
        num_clients=len(spans),
        seconds=end - begin,
        num_operations=len(latencies),
        per_second=len(latencies) / (end - begin),
        p50_ms=percentile(latencies, 0.50) * 1e3,
        p99_ms=percentile(latencies, 0.99) * 1e3,
    )
