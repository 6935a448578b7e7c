"""What a leader does beside its work goes on, whatever happens to it."""

import asyncio
import logging
import threading

import pytest
import sqlalchemy as sa

from tinkerbell.errors import Unavailable
from tinkerbell.scheduler.chore import Chore


class Fails(Chore):
    """A few times, then no more."""

    put_off = "not done"

    def __init__(self, *failures: Exception) -> None:
        super().__init__(0.1)
        self.failures = list(failures)
        self.done = asyncio.Event()

    def do(self, every_s: float) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.done.set()


class Lasts(Chore):
    """Until it is told to end."""

    put_off = "not done"

    def __init__(self) -> None:
        super().__init__(0.1)
        self.begun, self.let_go = threading.Event(), threading.Event()

    def do(self, every_s: float) -> None:
        self.begun.set()
        self.let_go.wait(30)


def test_chores_that_take_their_time_leave_the_loop_its_threads() -> None:
    """One of which renews the lease."""

    async def run() -> None:
        chores = [Lasts() for _ in range(40)]
        running = [asyncio.create_task(chore.run()) for chore in chores]
        try:
            while not all(chore.begun.is_set() for chore in chores):
                await asyncio.sleep(0.01)
            assert await asyncio.wait_for(asyncio.to_thread(lambda: "renewed"), 20) == "renewed"
        finally:
            for chore, task in zip(chores, running, strict=True):
                task.cancel()
                chore.let_go.set()
            await asyncio.gather(*running, return_exceptions=True)
        assert all(chore.over for chore in chores)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_chore_is_tried_again_whatever_it_raises(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        chore = Fails(Unavailable("no"), sa.exc.TimeoutError("no connection is free"), OSError("disk"), KeyError("x"))
        running = asyncio.create_task(chore.run())
        while not chore.done.is_set():
            assert not running.done()
            await asyncio.sleep(0.01)
        running.cancel()

    with caplog.at_level(logging.WARNING):
        asyncio.run(asyncio.wait_for(run(), 30))
    said = [(record.levelname, record.exc_info is not None) for record in caplog.records]
    assert said == [("WARNING", False), ("ERROR", True), ("ERROR", True), ("ERROR", True)]
