"""Requests that do not get on: each is answered with the reason or tried again later, and nobody else waits."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence

import sqlalchemy.exc

from tinkerbell.errors import UNREADABLE, TinkerbellError, Unavailable
from tinkerbell.scheduler.bodies import Bodies
from tinkerbell.scheduler.journal import Journal
from tinkerbell.scheduler.pending import Pending, PendingRequest, Reason
from tinkerbell.types import AdapterId, TenantId

log = logging.getLogger("tinkerbell.scheduler")

TRY_AGAIN = (Unavailable, OSError, MemoryError, sqlalchemy.exc.SQLAlchemyError)
"""What says nothing of a request: too many open files, a disk or a database that does not answer now."""

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0


def why(exc: Exception) -> Reason:
    """Why a request cannot run, of what was raised for it. Logs what nobody expected."""
    if isinstance(exc, UNREADABLE):
        return Reason("server", exc.slug, exc.detail)
    log.error("a request failed unexpectedly", exc_info=exc)
    told = exc.detail if isinstance(exc, TinkerbellError) else f"an unexpected error ({type(exc).__name__})"
    return Reason("server", "server-error", f"{told}; the server's log has more")


class Setbacks:
    """Of one leadership."""

    def __init__(self, pending: Pending, journal: Journal, bodies: Bodies, wake: Callable[[], None]) -> None:
        self._pending = pending
        self._journal = journal
        self._bodies = bodies
        self._wake = wake
        self._attempts: dict[tuple[TenantId, AdapterId | None], int] = {}

    def fail(self, requests: Sequence[PendingRequest], reason: Reason, batch: str | None = None) -> None:
        """Answer requests that were taken from their queues already."""
        self._journal.fail(requests, reason, batch)
        for request in requests:
            self._bodies.forget(request)

    def give_up(self, request: PendingRequest, reason: Reason, batch: str | None = None) -> None:
        """Answer the first request of its queue, which cannot run."""
        self._pending.finish(request)
        self.fail([request], reason, batch)
        if request.kind == "add_lora":
            self.never_made(request, reason)

    def never_made(self, request: PendingRequest, reason: Reason) -> None:
        """Nothing can be asked of an adapter whose add_lora failed."""
        assert request.adapter is not None
        told = Reason(reason.category, "adapter-failed", f"add_lora failed: {reason.message}")
        self._pending.end(request.tenant, request.adapter, told)

    def read(self, request: PendingRequest, exc: Exception) -> None:
        """Reading what the request needs, before it ran, raised this: it waits, or is given up."""
        if isinstance(exc, TRY_AGAIN):
            self.postpone(request, exc)
        else:
            self.give_up(request, why(exc))

    def postpone(self, request: PendingRequest, exc: Exception) -> None:
        """Leave the request's queue alone for a while, longer each time."""
        key = request.tenant, request.adapter
        attempts = self._attempts[key] = self._attempts.get(key, 0) + 1
        pause_s = min(FIRST_PAUSE_S * 2 ** min(attempts - 1, 10), LONGEST_PAUSE_S)
        log.warning("request postponed request=%d pause_s=%.1f detail=%s", request.position, pause_s, exc)
        self._pending.block(*key)
        asyncio.get_running_loop().call_later(pause_s, self._resume, *key)

    def went_on(self, request: PendingRequest) -> None:
        """What was needed could be read."""
        self._attempts.pop((request.tenant, request.adapter), None)

    def hold_back(self, requests: Iterable[PendingRequest], until: "asyncio.Task[None]") -> None:
        """Later results of their adapters may not overtake those being written."""
        held = {(request.tenant, request.adapter) for request in requests if request.adapter is not None}
        for key in held:
            self._pending.block(*key)

        def go_on(_task: object) -> None:
            for key in held:
                self._resume(*key)

        until.add_done_callback(go_on)

    def _resume(self, tenant: TenantId, adapter: AdapterId | None) -> None:
        self._pending.unblock(tenant, adapter)
        self._wake()
