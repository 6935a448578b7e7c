"""The threads of the HTTP edge: nobody has all of them, turns go round, and callers that leave take nothing along."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from tinkerbell.api.threads import FairThreads
from tinkerbell.errors import TooManyRequests


def held(threads: FairThreads, gate: threading.Event) -> Callable[[str], "asyncio.Task[bool]"]:
    """Calls that keep their thread until the gate opens."""
    return lambda tenant: asyncio.create_task(threads.run(tenant, gate.wait, 30))


def in_loop(scenario: Callable[[FairThreads, threading.Event], Coroutine[Any, Any, None]], **options: Any) -> None:
    threads, gate = FairThreads("test", 4, **options), threading.Event()

    async def run() -> None:
        try:
            await asyncio.wait_for(scenario(threads, gate), 30)
        finally:
            gate.set()

    asyncio.run(run())
    threads.close()


def test_a_tenant_whose_calls_never_end_leaves_threads_to_the_others() -> None:
    async def scenario(threads: FairThreads, gate: threading.Event) -> None:
        hold = held(threads, gate)
        floods = [hold("flood") for _ in range(50)]
        await asyncio.sleep(0)
        for _ in range(3):
            assert await threads.run("alice", lambda: 7) == 7
        gate.set()
        assert all(await asyncio.gather(*floods))

    in_loop(scenario)


def test_whoever_waits_takes_turns_by_tenant() -> None:
    order: list[str] = []

    async def scenario(threads: FairThreads, gate: threading.Event) -> None:
        first = [held(threads, gate)(tenant) for tenant in ("a", "a", "b", "b")]
        await asyncio.sleep(0)
        later = [
            asyncio.create_task(threads.run(tenant, lambda tenant=tenant: order.append(tenant)))  # type: ignore[misc]
            for tenant in (*["flood"] * 20, "c", "d")
        ]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*first, *later)

    in_loop(scenario)
    assert order.index("c") <= 4 and order.index("d") <= 5, order


def test_a_line_that_is_too_long_is_refused_and_others_are_not() -> None:
    async def scenario(threads: FairThreads, gate: threading.Event) -> None:
        tasks = [held(threads, gate)("flood") for _ in range(2 + 3)]
        await asyncio.sleep(0)
        with pytest.raises(TooManyRequests, match="3 calls of yours wait"):
            await threads.run("flood", lambda: 7)
        assert await threads.run("alice", lambda: 7) == 7
        gate.set()
        await asyncio.gather(*tasks)
        assert await threads.run("flood", lambda: 7) == 7

    in_loop(scenario, most_waiting=3)


def test_callers_that_leave_give_back_what_they_had_once_their_call_has_ended() -> None:
    async def scenario(threads: FairThreads, gate: threading.Event) -> None:
        running = [held(threads, gate)("gone") for _ in range(2)]
        waiting = [held(threads, gate)("gone") for _ in range(5)]
        await asyncio.sleep(0)
        for task in (*running, *waiting):
            task.cancel()
        for task in (*running, *waiting):
            with suppress(asyncio.CancelledError):
                await task
        again = held(threads, gate)("gone")
        await asyncio.sleep(0.01)
        assert not again.done(), "their calls still run"
        gate.set()
        assert await again
        assert await asyncio.gather(*(threads.run(t, lambda: 7) for t in ("gone", "a", "b", "c") * 3)) == [7] * 12

    in_loop(scenario)


def test_what_a_call_raises_is_raised_and_its_thread_is_free_again() -> None:
    def fail() -> None:
        raise ValueError("no")

    async def scenario(threads: FairThreads, gate: threading.Event) -> None:
        for _ in range(9):
            with pytest.raises(ValueError, match="no"):
                await threads.run("alice", fail)

    in_loop(scenario)
