"""Takes out the weights of samplers without a name that nobody asks for any more, while this process leads.

A loop of reinforcement learning makes such a sampler at every step and samples from the last few. Whoever wants to keep
one gives it a name.
"""

import itertools
import logging
import time
from collections.abc import Iterable

from tinkerbell.events.leases import Lease
from tinkerbell.events.retention import POSITIONS_AT_ONCE
from tinkerbell.events.rows import SamplerWeightsRow
from tinkerbell.events.sessions import ask_to_leave
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.chore import Chore

log = logging.getLogger("tinkerbell.scheduler")

EVERY_S = 100.0
"""It looks ten times as often."""


class SamplerExpiry(Chore):
    """First the adapter that holds such weights is asked to leave the executor, then their bytes go. The log says
    both."""

    put_off = "weights of samplers not removed"

    def __init__(self, store: EventStore, lease: Lease, num_kept: int, idle_s: float, every_s: float) -> None:
        """`num_kept`: of each model; older ones go when nobody used them for `idle_s`."""
        super().__init__(every_s)
        self._store = store
        self._lease = lease
        self._num_kept = num_kept
        self._idle_s = idle_s

    def do(self, every_s: float) -> None:
        """Whatever there is by now."""
        now_us = time.time_ns() // 1000
        idle_since_us = now_us - round(self._idle_s * 1e6)
        rows = self._store.queries.sampler_weights()
        over = {row.id for row in rows if row.ended_us is not None or (row.expires_us or now_us + 1) <= now_us}
        over |= {
            row.id
            for row in superfluous(rows, self._num_kept)
            if row.created_us < idle_since_us and not self._store.queries.is_used(row.sampler, idle_since_us)
        }
        fence = (self._lease.resource, self._lease.epoch)
        gone: list[SamplerWeightsRow] = []
        for row in rows:
            if row.id not in over or self.over:
                continue
            if row.sampler_state in ("pending", "ready"):
                ask_to_leave(self._store, row.tenant, row.sampler, actor=self._lease.holder, fence=fence)
            else:
                gone.append(row)
        for tenant, of_one in itertools.groupby(sorted(gone, key=_by_tenant), key=_by_tenant):
            part = list(of_one)[:POSITIONS_AT_ONCE]
            swept = self._store.retention.supersede(tenant, part, actor=self._lease.holder, fence=fence)
            log.info("weights of samplers removed tenant=%s samplers=%d bytes=%d", tenant, len(part), swept.num_bytes)


def superfluous(rows: Iterable[SamplerWeightsRow], num_kept: int) -> list[SamplerWeightsRow]:
    """Those than which `num_kept` of their model are newer."""
    ordered = sorted(rows, key=lambda row: (row.adapter, -row.position))
    return [
        row
        for _, of_one in itertools.groupby(ordered, key=lambda row: row.adapter)
        for row in itertools.islice(of_one, num_kept, None)
    ]


def _by_tenant(row: SamplerWeightsRow) -> str:
    return row.tenant
