"""Seals the log from time to time while this process leads."""

import asyncio
import logging
import time

from tinkerbell.errors import TinkerbellError
from tinkerbell.events.leases import Lease
from tinkerbell.events.store import EventStore

log = logging.getLogger("tinkerbell.scheduler")

LONGEST_PAUSE_S = 600.0
SHORTEST_PAUSE_S = 0.05


class Sealer:
    """One leadership's."""

    def __init__(self, store: EventStore, lease: Lease, every_s: float | None) -> None:
        """`every_s` None: never."""
        self._store = store
        self._lease = lease
        self._every_s = every_s

    async def run(self) -> None:
        """Until it is cancelled. A seal that cannot be written is written later: nothing waits for it."""
        if self._every_s is None:
            return
        while True:
            try:
                await asyncio.to_thread(self._seal_if_due, self._every_s)
            except TinkerbellError as exc:
                log.warning("log not sealed detail=%s", exc)
            await asyncio.sleep(min(max(self._every_s / 10, SHORTEST_PAUSE_S), LONGEST_PAUSE_S))

    def _seal_if_due(self, every_s: float) -> None:
        last_us = self._store.last_sealed_us()
        if last_us is None or time.time() - last_us / 1e6 < every_s:
            return
        lease = self._lease
        sealed = self._store.seal(actor=lease.holder, fence=(lease.resource, lease.epoch))
        if sealed is not None:
            # In the server's own log as well: that is one place more where it is kept.
            log.info("log sealed root=%s position=%d streams=%d", sealed.root, sealed.position, sealed.num_streams)
