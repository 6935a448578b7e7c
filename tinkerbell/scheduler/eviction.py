"""Bounds what the executor holds: adapters that nobody asked for lately leave it, and come back from the log."""

import logging
import math
import time

from tinkerbell.executors.link import ExecutorLink
from tinkerbell.scheduler.checkpoints import Checkpoints
from tinkerbell.scheduler.pending import Pending
from tinkerbell.scheduler.residency import Residency
from tinkerbell.types import is_sampler

log = logging.getLogger("tinkerbell.scheduler")


class Eviction:
    """Least recently used first; never one that has work waiting."""

    def __init__(
        self,
        residency: Residency,
        checkpoints: Checkpoints,
        most_adapters: int,
        most_sampler_bytes: int,
        idle_s: float | None,
    ) -> None:
        self._residency = residency
        self._checkpoints = checkpoints
        self._most_adapters = most_adapters
        self._most_sampler_bytes = most_sampler_bytes
        self._idle_s = math.inf if idle_s is None else idle_s

    async def make_room(self, link: ExecutorLink, pending: Pending) -> bool:
        """Let adapters go that were idle for `idle_s`, samplers until those here have `most_sampler_bytes`, and others
        until at most `most_adapters` are left, if so many are idle; whether the executor was needed for it.

        One with steps that no checkpoint holds gets a recovery point first, and stays until that is written: at most
        one is taken here. Gradients since its last step are not in it: they are computed again from the log when the
        adapter is wanted. Raises ExecutorDied.
        """
        excess = len(self._residency) - self._most_adapters
        by_use = self._residency.by_use()
        surplus = sum(r.num_weight_bytes for r in by_use if is_sampler(r.adapter)) - self._most_sampler_bytes
        forgotten_s = time.monotonic() - self._idle_s
        did = False
        for resident in by_use:
            if excess <= 0 and surplus <= 0 and resident.used_s > forgotten_s:
                break
            in_surplus = surplus > 0 and is_sampler(resident.adapter)
            if excess <= 0 and not in_surplus and resident.used_s > forgotten_s:
                continue
            if pending.queue(resident.tenant, resident.adapter) is not None:
                continue
            if resident.steps_ahead:
                if not did:
                    did = await self._checkpoints.write_now(link, resident)
                # It leaves as soon as that is written; where it cannot be written another has to.
                excess -= resident.point_on_its_way
                continue
            await link.remove(resident.adapter)
            self._residency.forget(resident.adapter)
            excess -= 1
            surplus -= resident.num_weight_bytes if in_surplus else 0
            did = True
            log.info("adapter evicted adapter=%s step=%d", resident.adapter, resident.step)
        return did
