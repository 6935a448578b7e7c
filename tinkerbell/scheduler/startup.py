"""What a new leader reads from the log before it leads. The lease must be held, so that nobody else
answers."""

from dataclasses import dataclass

from tinkerbell.errors import Corrupt
from tinkerbell.events import kinds
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.pending import Reason
from tinkerbell.types import AdapterId, TenantId

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Backlog:
    """Everything up to `head`."""

    head: int
    requests: list[Recorded]
    """Without a result, by position."""
    charges: dict[int, int]
    """Position -> microseconds that earlier leaders charged for chunks of it."""
    weights: dict[TenantId, float]
    ended: dict[tuple[TenantId, AdapterId], Reason]
    """Removed or failed adapters that still have pending requests."""


def read_backlog(store: EventStore) -> Backlog:
    """Blocking. Raises Corrupt."""
    head = store.head()
    # Read after the head is known, so that nothing falls between this and a subscription from `head`.
    rows = [row for row in store.queries.pending() if row.id <= head]
    requests: list[Recorded] = []
    for row in rows:
        recorded = store.get(row.id)
        if recorded is None:
            raise Corrupt(f"event {row.id} is missing")
        requests.append(recorded)
    weights = {tenant: store.queries.tenant(tenant).weight for tenant in store.queries.tenants()}
    return Backlog(head, requests, _charges(store, requests), weights, _ended(store, requests))


def _charges(store: EventStore, requests: list[Recorded]) -> dict[int, int]:
    """Only what is cut into chunks can have run in part."""
    data = [
        r.position for r in requests if isinstance(r.event, kinds.ForwardRequested | kinds.ForwardBackwardRequested)
    ]
    charges = dict.fromkeys(data, 0)
    after = min(data, default=None)
    while after is not None and (page := store.read(after, limit=_PAGE, types=["batch.ran"])):
        for recorded in page:
            assert isinstance(recorded.event, kinds.BatchRan)
            for request, cost_us in recorded.event.charges:
                if request in charges:
                    charges[request] += cost_us
        after = page[-1].position
    return charges


def _ended(store: EventStore, requests: list[Recorded]) -> dict[tuple[TenantId, AdapterId], Reason]:
    ended: dict[tuple[TenantId, AdapterId], Reason] = {}
    for tenant, adapter in {(r.tenant, r.adapter) for r in requests if r.adapter is not None}:
        row = store.queries.adapter(tenant, adapter)
        if row is not None and row.state in ("removed", "failed"):
            ended[tenant, adapter] = Reason("user", "not-found", f"adapter {adapter} is {row.state}")
    return ended
