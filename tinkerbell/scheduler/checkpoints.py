"""Recovery points: checkpoints the server writes of its own accord, so that little is executed again.

One is a chore: the log can do without it. It takes the executor's time between two batches, one at a time, and memory
until it is written; where it cannot be written the adapter goes on from its former one, and it is tried again later.
"""

import asyncio
import base64
import contextlib
import hashlib
import logging
import math
import secrets
from collections.abc import Callable

from tinkerbell.events.kinds import CheckpointWritten, SaveRequested
from tinkerbell.executors.link import ExecutorLink
from tinkerbell.scheduler import metrics
from tinkerbell.scheduler.journal import Journal
from tinkerbell.scheduler.pending import PendingRequest
from tinkerbell.scheduler.recovery import state_blobs
from tinkerbell.scheduler.residency import Residency, Resident
from tinkerbell.types import AdapterId, CheckpointId

log = logging.getLogger("tinkerbell.scheduler")

SPREAD = 0.25
"""The part of the time between two points by which an adapter's comes earlier, at most: adapters that began together
would go on needing theirs at the same moment."""

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 300.0


class Checkpoints:
    """Takes snapshots between batches; hashing and writing happen beside everything else."""

    def __init__(
        self,
        journal: Journal,
        residency: Residency,
        every_steps: int,
        every_s: float | None,
        most_bytes: int,
        on_end: Callable[[], None],
    ) -> None:
        """`most_bytes`: of states on their way to the blob store; a larger one goes alone. `on_end` is called when one
        was written, or could not be."""
        self._journal = journal
        self._residency = residency
        self._every_steps = every_steps
        self._every_s = math.inf if every_s is None else every_s
        self._most_bytes = most_bytes
        self._on_end = on_end
        self._writing: set[asyncio.Task[Exception | None]] = set()

    async def write_due(self, link: ExecutorLink) -> bool:
        """For the adapter that is furthest past `every_steps` or `every_s` since its last one, if there is room;
        whether there was one. Raises ExecutorDied."""
        now_s = asyncio.get_running_loop().time()
        due = None
        for resident in self._residency.moved():
            if resident.ahead_since_s is None:
                resident.ahead_since_s = now_s
            if self._is_possible(resident) and (late := self._late(resident, now_s)) >= max(1.0, due[0] if due else 0):
                due = late, resident
        if due is None or not self.has_room(due[1]):
            return False
        await self._write(link, due[1])
        return True

    async def write_now(self, link: ExecutorLink, resident: Resident) -> bool:
        """For one adapter, if there is room and no failure to wait after; whether it was. Raises ExecutorDied."""
        if not (self._is_possible(resident) and self.has_room(resident)):
            return False
        await self._write(link, resident)
        return True

    async def write_all(self, link: ExecutorLink, deadline: float) -> None:
        """For every adapter that moved, while the loop's clock is before `deadline`. Raises ExecutorDied."""
        loop = asyncio.get_running_loop()
        left = self._residency.moved()
        while left and loop.time() < deadline:
            if self.has_room(left[-1]):
                resident = left.pop()
                if not resident.point_on_its_way:
                    await self._write(link, resident)
            else:
                await self._one_less(deadline)
        if left:
            log.warning("no time for recovery points adapters=%d", len(left))
        while self._writing and loop.time() < deadline:
            await self._one_less(deadline)

    def delay(self, request: PendingRequest) -> bool:
        """Whether this saves a state of an adapter that is here, and there is no room for it now."""
        saves = isinstance(request.event, SaveRequested) and request.adapter in self._residency
        return saves and not self.has_room(self._residency[request.adapter or ""])

    def has_room(self, resident: Resident) -> bool:
        """Whether another state of this adapter may be on its way to the blob store."""
        before = self._journal.num_bytes_apart
        return before == 0 or before + resident.num_bytes <= self._most_bytes

    def _is_possible(self, resident: Resident) -> bool:
        return not resident.point_on_its_way and asyncio.get_running_loop().time() >= resident.resting_until_s

    def _late(self, resident: Resident, now_s: float) -> float:
        """1 when it is due, 2 after twice the time."""
        assert resident.ahead_since_s is not None
        share = 1 - SPREAD * phase(resident.adapter)
        steps = self._every_steps - math.floor(self._every_steps * (1 - share))
        return max(resident.steps_ahead / steps, (now_s - resident.ahead_since_s) / (self._every_s * share))

    async def _write(self, link: ExecutorLink, resident: Resident) -> None:
        state = (await link.snapshot(resident.adapter)).value
        blobs = state_blobs(state)
        event = CheckpointWritten(
            checkpoint=new_checkpoint_id(),
            after_seq=resident.boundary_seq,
            step=state.step,
            lora=state.lora,
            num_bytes=sum(map(len, blobs.values())),
            state_digest=state.digest,
        )
        resident.state_bytes = event.num_bytes
        resident.point_on_its_way = True
        steps = resident.steps_ahead
        writing = self._journal.checkpoint(resident, event, blobs)
        self._writing.add(writing)
        writing.add_done_callback(lambda done: self._end(resident, steps, done))

    def _end(self, resident: Resident, steps: int, writing: "asyncio.Task[Exception | None]") -> None:
        self._writing.discard(writing)
        resident.point_on_its_way = False
        self._on_end()
        if writing.cancelled():
            return
        exc = writing.result()
        metrics.RECOVERY_POINTS.labels("written" if exc is None else "failed").inc()
        if exc is None:
            resident.saved(steps)
            return
        pause_s = min(FIRST_PAUSE_S * 2**resident.failed_points, LONGEST_PAUSE_S)
        resident.failed_points += 1
        resident.resting_until_s = asyncio.get_running_loop().time() + pause_s
        log.error(
            "recovery point not written, tried again in %g s adapter=%s attempt=%d detail=%s",
            *(pause_s, resident.adapter, resident.failed_points, exc),
        )

    async def _one_less(self, deadline: float) -> None:
        """Wait for one of those on their way, not beyond the deadline."""
        left_s = max(deadline - asyncio.get_running_loop().time(), 0.0)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._journal.one_less_apart(), left_s)


def phase(adapter: AdapterId) -> float:
    """In [0, 1): where in the cycle of points an adapter's lies, the same in every life of the server."""
    return int.from_bytes(hashlib.sha256(adapter.encode()).digest()[:8]) / 2**64


def new_checkpoint_id() -> CheckpointId:
    """`ck_` and 20 random characters."""
    return "ck_" + base64.b32encode(secrets.token_bytes(13)).decode().lower()[:20]
