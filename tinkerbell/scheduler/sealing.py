"""Seals the log from time to time while this process leads."""

import logging
import time

from tinkerbell.events.leases import Lease
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.chore import Chore

log = logging.getLogger("tinkerbell.scheduler")


class Sealer(Chore):
    """One leadership's."""

    put_off = "log not sealed"

    def __init__(self, store: EventStore, lease: Lease, every_s: float | None) -> None:
        """`every_s` None: never."""
        super().__init__(every_s)
        self._store = store
        self._lease = lease

    def do(self, every_s: float) -> None:
        """Seal it unless it was sealed less than `every_s` ago."""
        last_us = self._store.last_sealed_us()
        if last_us is None or time.time() - last_us / 1e6 < every_s:
            return
        lease = self._lease
        sealed = self._store.seal(actor=lease.holder, fence=(lease.resource, lease.epoch))
        if sealed is not None:
            # In the server's own log as well: that is one place more where it is kept.
            log.info("log sealed root=%s position=%d streams=%d", sealed.root, sealed.position, sealed.num_streams)
