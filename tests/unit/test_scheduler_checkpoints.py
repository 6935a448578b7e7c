"""When recovery points are taken: spread, one at a time, in bounded memory, and again after one failed."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tinkerbell.executors.link import Timed
from tinkerbell.executors.port import AdapterState
from tinkerbell.scheduler import checkpoints
from tinkerbell.scheduler.checkpoints import SPREAD, Checkpoints, phase
from tinkerbell.scheduler.eviction import Eviction
from tinkerbell.scheduler.pending import Pending
from tinkerbell.scheduler.residency import Residency, Resident
from tinkerbell.types import LoraConfig

NUM_ADAPTERS = 60
STATE = 100
"""Bytes of one."""


@dataclass
class Writes:
    """Stands for the journal: its writes end when the test says so."""

    on_their_way: dict[str, "asyncio.Future[Exception | None]"] = field(default_factory=dict)
    most: int = 0

    @property
    def num_bytes_apart(self) -> int:
        return STATE * len(self.on_their_way)

    def checkpoint(self, resident: Resident, event: Any, blobs: dict[str, bytes]) -> "asyncio.Future[Exception | None]":
        writing: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.on_their_way[resident.adapter] = writing
        self.most = max(self.most, self.num_bytes_apart)
        return writing

    async def end(self, adapter: str, exc: Exception | None = None) -> None:
        self.on_their_way.pop(adapter).set_result(exc)
        await asyncio.sleep(0)


class Link:
    """Counts snapshots."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.removed: list[str] = []

    async def snapshot(self, adapter: str) -> Timed[AdapterState]:
        self.taken.append(adapter)
        config = b"{}"
        state = AdapterState(
            lora=LoraConfig(rank=1), step=1, weights=bytes(STATE - len(config)), adapter_config=config, optimizer=None,
            digest="d",
        )  # fmt: skip
        return Timed(state, 0)

    async def remove(self, adapter: str) -> None:
        self.removed.append(adapter)


@dataclass
class Scene:
    journal: Writes
    residency: Residency
    link: Any
    points: Checkpoints


def scene(every_steps: int = 100, every_s: float | None = None, most_bytes: int = 5 * STATE) -> Scene:
    """Sixty adapters that took their steps together."""
    journal, residency, link = Writes(), Residency(), Link()
    for number in range(NUM_ADAPTERS):
        adapter = f"ad_{number}"
        residency.put(
            Resident("t", adapter, num_parameters=STATE // 12, step=1, state_digest="d", boundary_seq=1,
                     boundary_position=2, steps_ahead=100)
        )  # fmt: skip
    made: Any = journal
    return Scene(journal, residency, link, Checkpoints(made, residency, every_steps, every_s, most_bytes, lambda: None))


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await test()

    asyncio.run(run())


def test_points_due_together_are_taken_one_at_a_time_in_bounded_memory() -> None:
    async def run() -> None:
        s = scene()
        for _ in range(20):
            before = len(s.link.taken)
            await s.points.write_due(s.link)
            assert len(s.link.taken) - before <= 1
        assert len(s.link.taken) == 5 and s.journal.most == 5 * STATE
        while s.journal.on_their_way:
            await s.journal.end(next(iter(s.journal.on_their_way)))
            await s.points.write_due(s.link)
        assert sorted(s.link.taken) == sorted(r.adapter for r in s.residency.by_use())
        assert s.journal.most == 5 * STATE
        assert s.residency.moved() == []

    in_loop(run)


def test_a_state_larger_than_all_that_may_be_on_its_way_goes_alone() -> None:
    async def run() -> None:
        s = scene(most_bytes=STATE // 2)
        assert await s.points.write_due(s.link)
        assert not await s.points.write_due(s.link)
        await s.journal.end(s.link.taken[0])
        assert await s.points.write_due(s.link)

    in_loop(run)


def test_adapters_that_began_together_are_due_at_different_times() -> None:
    phases = [phase(f"ad_{number}") for number in range(NUM_ADAPTERS)]
    assert phases == [phase(f"ad_{number}") for number in range(NUM_ADAPTERS)], "another life gives the same"
    assert all(0 <= each < 1 for each in phases)
    # Of sixty at random in ten equal parts of the time, no part has half of them, and few are empty.
    parts = [sum(int(each * 10) == part for each in phases) for part in range(10)]
    assert max(parts) < NUM_ADAPTERS // 2 and parts.count(0) <= 2

    async def run() -> None:
        s = scene(every_steps=1000, most_bytes=NUM_ADAPTERS * STATE)
        due = []
        for steps in range(700, 1001):
            for resident in s.residency.by_use():
                resident.steps_ahead = steps
            while await s.points.write_due(s.link):
                due.append(steps)
        assert len(due) == NUM_ADAPTERS, "none later than it was told"
        assert min(due) >= 1000 * (1 - SPREAD) and len(set(due)) > NUM_ADAPTERS // 2

    in_loop(run)


def test_one_that_could_not_be_written_is_tried_again_later_and_its_steps_count_until_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "FIRST_PAUSE_S", 0.02)

    async def run() -> None:
        s = scene(every_steps=100)
        for resident in s.residency.by_use()[1:]:
            resident.steps_ahead = 0
        (resident,) = s.residency.moved()
        assert await s.points.write_due(s.link)
        resident.steps_ahead += 7
        assert not await s.points.write_due(s.link), "one at a time"
        await s.journal.end(resident.adapter, OSError("no space"))
        assert (resident.steps_ahead, resident.failed_points) == (107, 1)
        assert not await s.points.write_due(s.link), "not at once"
        while not await s.points.write_due(s.link):
            await asyncio.sleep(0.005)
        resident.steps_ahead += 2
        await s.journal.end(resident.adapter)
        assert (resident.steps_ahead, resident.failed_points) == (2, 0)

    in_loop(run)


def test_weights_of_idle_samplers_are_bounded_by_bytes_and_nobody_else_has_to_go() -> None:
    async def run() -> None:
        s = scene()
        for number in range(6):
            adapter = f"se_x:sample:{number}"
            s.residency.put(
                Resident("t", adapter, num_parameters=10, step=0, state_digest="d", boundary_seq=0, boundary_position=1)
            )
        s.residency.use("se_x:sample:0")
        eviction = Eviction(s.residency, s.points, 1000, 2 * 10 * 4, None)
        assert await eviction.make_room(s.link, Pending())
        assert s.link.removed == [f"se_x:sample:{number}" for number in (1, 2, 3, 4)]
        assert len(s.residency) == NUM_ADAPTERS + 2 and not s.link.taken
        assert not await eviction.make_room(s.link, Pending())

    in_loop(run)


def test_what_cannot_be_saved_stays_in_the_executor() -> None:
    async def run() -> None:
        s = scene(every_steps=1000)
        eviction = Eviction(s.residency, s.points, NUM_ADAPTERS - 1, 2**40, None)
        first, second = (r.adapter for r in s.residency.by_use()[:2])
        assert await eviction.make_room(s.link, Pending())
        assert s.link.taken == [first] and not s.link.removed, "it stays until it is written"
        assert not await eviction.make_room(s.link, Pending())
        await s.journal.end(first, OSError("no space"))
        assert await eviction.make_room(s.link, Pending())
        assert s.link.taken == [first, second], "another has to go"
        await s.journal.end(second)
        assert await eviction.make_room(s.link, Pending())
        assert s.link.removed == [second] and first in s.residency
        assert not await eviction.make_room(s.link, Pending())

    in_loop(run)
