"""Ends sessions whose program has vanished, while this process leads."""

import logging
import time

import msgspec

from tinkerbell.errors import TinkerbellError
from tinkerbell.events.leases import Lease
from tinkerbell.events.rows import SessionRow
from tinkerbell.events.sessions import EXPIRED, ending
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.chore import Chore

log = logging.getLogger("tinkerbell.scheduler")

HEARING_S = 600.0
"""How long a new leader listens before it ends sessions: nobody could be heard while there was no server."""


class SessionExpiry(Chore):
    """One leadership's."""

    put_off = "sessions not looked at"

    def __init__(self, store: EventStore, lease: Lease, expiry_s: float | None) -> None:
        """`expiry_s` None: silence ends no session."""
        super().__init__(expiry_s)
        self._store = store
        self._lease = lease
        self._begun_s = time.monotonic()

    def do(self, every_s: float) -> None:
        """End those that were silent for `every_s`: no sign of life, no request, none that waits."""
        if time.monotonic() - self._begun_s < min(every_s, HEARING_S):
            return
        before_us = time.time_ns() // 1000 - round(every_s * 1e6)
        for row in self._store.queries.silent_sessions(before_us):
            try:
                self._end_unless_used(row, before_us, every_s)
            except TinkerbellError as exc:
                # Somebody removes one of its adapters right now; the others' sessions don't wait for that.
                log.warning("session not ended session=%s detail=%s", row.id, exc)

    def _end_unless_used(self, row: SessionRow, before_us: int, every_s: float) -> None:
        queries, lease = self._store.queries, self._lease
        if any(queries.is_used(each.id, before_us) for each in queries.living_adapters(row.tenant, row.id)):
            return
        events = ending(queries, row.tenant, row.id, EXPIRED, f"Nothing was heard of it for {every_s:g} s.")
        fence = (lease.resource, lease.epoch)
        self._store.append(*(msgspec.structs.replace(each, actor=lease.holder, fence=fence) for each in events))
        log.info("session expired session=%s adapters=%d", row.id, len(events) - 1)
