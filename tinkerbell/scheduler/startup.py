"""What a new leader reads from the log before it leads. The lease must be held, so that nobody else
answers."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from tinkerbell.events import kinds
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.pending import Reason
from tinkerbell.types import SYSTEM_TENANT, AdapterId, TenantId

log = logging.getLogger("tinkerbell.scheduler")

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Backlog:
    """Everything up to `head`."""

    head: int
    requests: list[Recorded]
    """Without a result, by position."""
    ran: dict[int, tuple[int, str]]
    """Position -> microseconds that earlier leaders charged for chunks of it, and the batch that ran the last one."""
    cancelled: list[int]
    """Positions of samples that were cancelled."""
    weights: dict[TenantId, float]
    ended: dict[tuple[TenantId, AdapterId], Reason]
    """Removed or failed adapters that still have pending requests."""


def read_backlog(store: EventStore) -> Backlog:
    """Blocking."""
    head = store.head()
    # Read after the head is known, so that nothing falls between this and a subscription from `head`.
    rows = [row for row in store.queries.pending() if row.id <= head]
    # Without bodies, which are read when their turn comes.
    requests = store.at([row.id for row in rows])
    if missing := {row.id for row in rows} - {request.position for request in requests}:
        # `tinkerbell audit verify` says so; the others' requests are not to wait for whoever mends it.
        log.error("pending requests are missing from the log positions=%s", sorted(missing))
    weights = store.queries.weights()
    return Backlog(head, requests, _ran(store, requests), _cancelled(store, requests), weights, _ended(store, requests))


def _ran(store: EventStore, requests: list[Recorded]) -> dict[int, tuple[int, str]]:
    waiting = {r.position for r in requests}
    ran: dict[int, tuple[int, str]] = {}
    for recorded in _since(store, waiting, kinds.BatchRan, SYSTEM_TENANT):
        event = recorded.event
        if not isinstance(event, kinds.BatchRan):
            continue
        for request, cost_us in event.charges:
            if request in waiting:
                before_us, _ = ran.get(request, (0, ""))
                ran[request] = before_us + cost_us, event.batch
    return ran


def _cancelled(store: EventStore, requests: list[Recorded]) -> list[int]:
    samples = {r.position for r in requests if isinstance(r.event, kinds.SampleRequested)}
    tenants = {r.tenant for r in requests if r.position in samples}
    said = (r.event for tenant in tenants for r in _since(store, samples, kinds.SampleCancelled, tenant))
    return [event.request for event in said if isinstance(event, kinds.SampleCancelled) and event.request in samples]


def _since(store: EventStore, positions: set[int], event: type[kinds.Event], tenant: TenantId) -> Iterator[Recorded]:
    """Events of the tenant of this type after the first of these positions."""
    after = min(positions, default=None)
    while after is not None and (page := store.read(after, limit=_PAGE, tenant=tenant, types=[kinds.type_of(event)])):
        yield from page
        after = page[-1].position


def _ended(store: EventStore, requests: list[Recorded]) -> dict[tuple[TenantId, AdapterId], Reason]:
    ended: dict[tuple[TenantId, AdapterId], Reason] = {}
    for tenant, adapter in {(r.tenant, r.adapter) for r in requests if r.adapter is not None}:
        row = store.queries.adapter(tenant, adapter)
        if row is not None and row.state in ("removed", "failed"):
            ended[tenant, adapter] = Reason("user", "not-found", f"adapter {adapter} is {row.state}")
    return ended
