"""What a leader learns of the log: the backlog it takes over, then every event as it is committed."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from tinkerbell.errors import Fenced
from tinkerbell.events import kinds
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.leases import Lease
from tinkerbell.scheduler.bodies import Bodies
from tinkerbell.scheduler.commits import Commits
from tinkerbell.scheduler.fair_share import FairShare
from tinkerbell.scheduler.gathering import Gathering
from tinkerbell.scheduler.pending import Pending, PendingRequest, Reason
from tinkerbell.scheduler.startup import Backlog

log = logging.getLogger("tinkerbell.scheduler")


class Intake:
    """Of one leadership; on its event loop."""

    def __init__(
        self,
        pending: Pending,
        shares: FairShare,
        gathering: Gathering,
        bodies: Bodies,
        lease: Lease,
        commits: Commits,
        wake: Callable[[], None],
        blamed: Mapping[int, int],
    ) -> None:
        """`blamed`: position of a request -> leaderships that ended over it, alone or among others."""
        self._pending = pending
        self._shares = shares
        self._gathering = gathering
        self._bodies = bodies
        self._lease = lease
        self._commits = commits
        self._wake = wake
        self._blamed = blamed

    def take_over(self, backlog: Backlog) -> int:
        """Begin with what was asked and not answered before. The position up to which it is known what waits."""
        self._pending.after = backlog.head
        for tenant, weight in backlog.weights.items():
            self._shares.set_weight(tenant, weight)
        for recorded in backlog.requests:
            self._measure(self._pending.add(recorded), recorded)
        for (tenant, adapter), reason in backlog.ended.items():
            self._pending.end(tenant, adapter, reason)
        for request in self._pending:
            request.cost_us, request.batch = backlog.ran.get(request.position, (0, None))
            self._judge(request)
        for position in backlog.cancelled:
            self._pending.cancel(position)
        log.info("leading epoch=%d position=%d pending=%d", self._lease.epoch, backlog.head, len(self._pending))
        return backlog.head

    def absorb(self, events: Sequence[Recorded]) -> None:
        """Take in what was committed since."""
        try:
            self._take_in(events)
        except Exception as exc:  # noqa: BLE001 - a request that is not taken in would wait for ever
            self._commits.fail(exc)

    def _take_in(self, events: Sequence[Recorded]) -> None:
        for recorded in events:
            event = recorded.event
            if isinstance(event, kinds.LeaseGranted) and self._is_replaced_by(event):
                # What follows is another leader's work. It may answer what runs here now, and must not take it out of
                # the queues under it.
                self._commits.fail(Fenced(f"{event.holder} leads by now; its epoch is {event.epoch}"))
            if self._commits.failed:
                return
            if isinstance(event, kinds.TenantConfigured):
                self._shares.set_weight(recorded.tenant, event.weight)
            request = self._pending.absorb(recorded)
            if isinstance(event, kinds.SampleCancelled):
                self._wake()
            if request is not None:
                self._measure(request, recorded)
                if request.adapter is not None:
                    self._gathering.sent(request.adapter, time.monotonic())
                self._wake()

    def _is_replaced_by(self, granted: kinds.LeaseGranted) -> bool:
        return granted.resource == self._lease.resource and granted.epoch > self._lease.epoch

    def _judge(self, request: PendingRequest) -> None:
        """What ended a leadership ends no other one: it is tried alone, and where it was alone then, it fails."""
        times = self._blamed.get(request.position, 0)
        if times and (times > 1 or len(self._blamed) == 1) and request.verdict is None:
            message = "the scheduler failed over this request; the server's log has more"
            request.verdict = Reason("server", "poison", message)
        request.deaths = times

    def _measure(self, request: PendingRequest, recorded: Recorded) -> None:
        try:
            self._bodies.take_inline(request, recorded)
        except Exception as exc:  # noqa: BLE001 - left unmeasured, it is read again and fails when its turn comes
            log.warning("body unreadable request=%d detail=%s", recorded.position, exc)
