"""Bounds what the executor holds: adapters that nobody asked for lately leave it, and come back from the log."""

import logging

from tinkerbell.executors.link import ExecutorLink
from tinkerbell.scheduler.checkpoints import Checkpoints
from tinkerbell.scheduler.pending import Pending
from tinkerbell.scheduler.residency import Residency

log = logging.getLogger("tinkerbell.scheduler")


class Eviction:
    """Least recently used first; never one that has work waiting."""

    def __init__(self, residency: Residency, checkpoints: Checkpoints, most_adapters: int) -> None:
        self._residency = residency
        self._checkpoints = checkpoints
        self._most_adapters = most_adapters

    async def make_room(self, link: ExecutorLink, pending: Pending) -> None:
        """Let adapters go until at most `most_adapters` are left, if so many are idle.

        One with steps that no checkpoint holds gets a recovery point first. Gradients since its last step are not in
        it: they are computed again from the log when the adapter is wanted. Raises ExecutorDied.
        """
        excess = len(self._residency) - self._most_adapters
        if excess <= 0:
            return
        idle = [r for r in self._residency.by_use() if pending.queue(r.tenant, r.adapter) is None]
        for resident in idle[:excess]:
            if resident.steps_ahead:
                await self._checkpoints.write(link, resident)
            await link.remove(resident.adapter)
            self._residency.forget(resident.adapter)
            log.info("adapter evicted adapter=%s step=%d", resident.adapter, resident.step)
