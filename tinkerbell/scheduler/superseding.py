"""Takes out recovery points that newer ones of their adapter have replaced, while this process leads."""

import itertools
import logging
from collections.abc import Iterable

from tinkerbell.events.leases import Lease
from tinkerbell.events.retention import POSITIONS_AT_ONCE
from tinkerbell.events.rows import RecoveryPointRow
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.chore import Chore

log = logging.getLogger("tinkerbell.scheduler")

EVERY_S = 100.0
"""It looks ten times as often."""


class Superseding(Chore):
    """An adapter comes back from its newest saved state, so what is older serves nobody but a replay, which can begin
    earlier. The log says what went."""

    put_off = "superseded recovery points not removed"

    def __init__(self, store: EventStore, lease: Lease, num_kept: int, every_s: float) -> None:
        """`num_kept`: of each adapter."""
        super().__init__(every_s)
        self._store = store
        self._lease = lease
        self._num_kept = num_kept

    def do(self, every_s: float) -> None:
        """Whatever there is by now."""
        lease = self._lease
        going = superseded(self._store.queries.recovery_points(), self._num_kept)
        for tenant, points in itertools.groupby(sorted(going, key=_by_tenant), key=_by_tenant):
            left = list(points)
            while left and not self.over:
                part, left = left[:POSITIONS_AT_ONCE], left[POSITIONS_AT_ONCE:]
                fence = (lease.resource, lease.epoch)
                swept = self._store.retention.supersede(tenant, part, actor=lease.holder, fence=fence)
                log.info(
                    "recovery points superseded tenant=%s points=%d files=%d bytes=%d",
                    *(tenant, len(part), swept.num_files, swept.num_bytes),
                )


def superseded(points: Iterable[RecoveryPointRow], num_kept: int) -> list[RecoveryPointRow]:
    """Those that hold less than the newest `num_kept` of their adapter, and all of an adapter that was removed."""
    found: list[RecoveryPointRow] = []
    ordered = sorted(points, key=lambda point: (point.adapter, -point.after_seq, -point.position))
    for _, of_one in itertools.groupby(ordered, key=lambda point: point.adapter):
        for number, point in enumerate(of_one):
            if number >= num_kept or point.adapter_state in ("removed", "failed"):
                found.append(point)
    return found


def _by_tenant(point: RecoveryPointRow) -> str:
    return point.tenant
