"""What counts as a sign of life of an executor: that the call it is busy with comes further. Real processes."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import get_args

import pytest

from tests.support import hanging
from tests.support.executor_driver import LORA, random_data
from tinkerbell.errors import ExecutorDied
from tinkerbell.executors import protocol
from tinkerbell.executors.link import ExecutorLink
from tinkerbell.executors.port import Batch, ForwardBackward
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.types import LossSpec

SILENCE_S = 4.0
WITHIN_S = 120.0
"""A hang that nobody notices takes an hour."""

BATCH = Batch(id="1.1", units=[ForwardBackward(request=1, adapter="ad_1", data=random_data(1, (4,)), loss=LossSpec())])


async def load(link: ExecutorLink) -> object:
    return await link.load("ad_1", (await link.snapshot("ad_1")).value, True)


CALLS: dict[type[protocol.Command], tuple[str, Callable[[ExecutorLink], Awaitable[object]]]] = {
    protocol.Start: ("__init__", lambda link: link.start()),
    protocol.Describe: ("describe", lambda link: link.start()),
    protocol.Create: ("create", lambda link: link.create("ad_1", LORA, 1)),
    protocol.Load: ("load", load),
    protocol.Snapshot: ("snapshot", lambda link: link.snapshot("ad_1")),
    protocol.Remove: ("remove", lambda link: link.remove("ad_1")),
    protocol.Run: ("run", lambda link: link.run(BATCH)),
}
"""Command -> the method of the port that carries it out, and a call that gets there."""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging.install(tmp_path, monkeypatch)


def link_to(options: ExecutorOptions) -> ExecutorLink:
    return ExecutorLink(hanging.KIND, options, SILENCE_S)


async def until_it_hangs(link: ExecutorLink, where: str, call: Callable[[ExecutorLink], Awaitable[object]]) -> None:
    if where not in ("__init__", "describe"):
        await link.start()
    if where not in ("__init__", "describe", "create"):
        await link.create("ad_1", LORA, 1)
    await call(link)


def test_every_command_that_is_answered_is_tried() -> None:
    assert set(CALLS) == set(get_args(protocol.Command)) - {protocol.Stop}


def test_a_process_that_hangs_is_killed_in_whatever_call() -> None:
    cases = [(hanging.options(where, "deadlocks"), where, call) for where, call in CALLS.values()]
    # An endless loop in a constructor cannot be told from a model that takes its time.
    cases += [(hanging.options("run", how), "run", CALLS[protocol.Run][1]) for how in ("sleeps", "spins")]

    async def hang(options: ExecutorOptions, where: str, call: Callable[[ExecutorLink], Awaitable[object]]) -> str:
        link = link_to(options)
        try:
            with pytest.raises(ExecutorDied) as caught:
                await until_it_hangs(link, where, call)
            assert not link.alive
            return str(caught.value)
        finally:
            await link.stop(0.0)

    async def test() -> None:
        found = await asyncio.wait_for(asyncio.gather(*(hang(*case) for case in cases)), WITHIN_S)
        for (options, where, _), said in zip(cases, found, strict=True):
            command = "start" if where in ("__init__", "describe") else where
            assert f"no progress in `{command}`" in said, (options, said)

    asyncio.run(test())


def test_a_process_that_takes_its_time_is_left_alone() -> None:
    """It makes marks; or nobody expected it to be done yet; or it loads a model, which is others' code."""
    cases = [("run", "crawls", 0.0), ("run", "computes", 60.0), ("__init__", "computes", 0.0)]

    async def take_time(where: str, how: str, estimated_s: float) -> None:
        link = link_to(hanging.options(where, how))
        try:
            await link.start()
            await link.create("ad_1", LORA, 1)
            assert (await link.run(BATCH, estimated_s)).results
            assert link.alive
        finally:
            await link.stop(0.0)

    async def test() -> None:
        await asyncio.wait_for(asyncio.gather(*(take_time(*case) for case in cases)), WITHIN_S)

    asyncio.run(test())
