"""Ends sessions whose program has vanished, while this process leads."""

import logging
import time

from tinkerbell.errors import TinkerbellError
from tinkerbell.events.leases import Lease
from tinkerbell.events.rows import SessionRow
from tinkerbell.events.sessions import EXPIRED, clear, end
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.chore import Chore

log = logging.getLogger("tinkerbell.scheduler")

HEARING_S = 600.0
"""How long a new leader listens before it ends sessions: nobody could be heard while there was no server."""

CLEARING_S = 3600.0


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
                # The others' sessions don't wait for this one.
                log.warning("session not ended session=%s detail=%s", row.id, exc)

    def _end_unless_used(self, row: SessionRow, before_us: int, every_s: float) -> None:
        queries, lease = self._store.queries, self._lease
        # Others ended before it; it may have spoken up in that time.
        now = queries.session(row.tenant, row.id)
        if now is None or now.ended_us is not None or now.heard_us >= before_us:
            return
        if queries.is_session_used(row.tenant, row.id, before_us):
            return
        detail = f"Nothing was heard of it for {every_s:g} s."
        fence = (lease.resource, lease.epoch)
        asked = end(self._store, row.tenant, row.id, EXPIRED, detail, actor=lease.holder, fence=fence)
        log.info("session expired session=%s adapters=%d", row.id, asked)


class SessionClearing(Chore):
    """One leadership's: what sessions left behind whose end was interrupted, or whose removals failed."""

    put_off = "ended sessions not cleared"

    def __init__(self, store: EventStore, lease: Lease, every_s: float = CLEARING_S) -> None:
        super().__init__(every_s)
        self._store = store
        self._lease = lease

    def do(self, every_s: float) -> None:
        """Ask adapters of ended sessions to leave the executor."""
        lease = self._lease
        for row in self._store.queries.uncleared_sessions():
            fence = (lease.resource, lease.epoch)
            asked = clear(self._store, row.tenant, row.id, actor=lease.holder, fence=fence)
            log.info("session cleared session=%s adapters=%d", row.id, asked)
