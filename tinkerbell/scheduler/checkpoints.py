"""Recovery points: checkpoints the server writes of its own accord, so that little is executed again."""

import asyncio
import base64
import logging
import math
import secrets

from tinkerbell.events.kinds import CheckpointWritten
from tinkerbell.executors.link import ExecutorLink
from tinkerbell.scheduler.journal import Journal
from tinkerbell.scheduler.recovery import state_blobs
from tinkerbell.scheduler.residency import Residency, Resident
from tinkerbell.types import CheckpointId

log = logging.getLogger("tinkerbell.scheduler")


class Checkpoints:
    """Takes snapshots between batches; hashing and writing happen beside everything else."""

    def __init__(self, journal: Journal, residency: Residency, every_steps: int, every_s: float | None) -> None:
        self._journal = journal
        self._residency = residency
        self._every_steps = every_steps
        self._every_s = math.inf if every_s is None else every_s

    async def write_due(self, link: ExecutorLink) -> None:
        """For every adapter that is `every_steps` or `every_s` past its last one. Raises ExecutorDied."""
        now_s = asyncio.get_running_loop().time()
        for resident in self._residency.moved():
            if resident.ahead_since_s is None:
                resident.ahead_since_s = now_s
            if resident.steps_ahead >= self._every_steps or now_s - resident.ahead_since_s >= self._every_s:
                await self.write(link, resident)

    async def write_all(self, link: ExecutorLink, deadline: float) -> None:
        """For every adapter that moved, while the loop's clock is before `deadline`. Raises ExecutorDied."""
        loop = asyncio.get_running_loop()
        left = self._residency.moved()
        while left and loop.time() < deadline:
            await self.write(link, left.pop())
        if left:
            log.warning("no time for recovery points adapters=%d", len(left))

    async def write(self, link: ExecutorLink, resident: Resident) -> None:
        """For one adapter. Raises ExecutorDied."""
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
        self._journal.checkpoint(resident, event, blobs)
        resident.steps_ahead = 0
        resident.ahead_since_s = None


def new_checkpoint_id() -> CheckpointId:
    """`ck_` and 20 random characters."""
    return "ck_" + base64.b32encode(secrets.token_bytes(13)).decode().lower()[:20]
