"""Which bodies and recovery points nothing living needs any more."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from tinkerbell.events import kinds
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.recovery import Marks, StateLost, covers, find_marks
from tinkerbell.types import AdapterId, CheckpointId, TenantId

_PAGE = 1000


@dataclass(slots=True)
class _Needed:
    """What of a tenant's bulk has to stay."""

    positions: set[int]
    """Of requests without an answer, and of the states that living adapters are restored from."""
    boundaries: dict[AdapterId, int]
    """Of each living adapter: what is trained after this position may have to be executed again."""
    checkpoints: set[CheckpointId]
    """That a living adapter or a request without an answer begins with, and those that a user still has."""

    lost: set[AdapterId]
    """Adapters that cannot be restored as the log is: whoever mends that needs all of theirs."""

    def __contains__(self, recorded: Recorded) -> bool:
        if recorded.adapter in self.lost:
            return True
        match recorded.event:
            case kinds.SaveCompleted() | kinds.CheckpointWritten() | kinds.CheckpointCopied() as made:
                if made.checkpoint in self.checkpoints:
                    return True
            case kinds.ForwardBackwardRequested() if recorded.adapter in self.boundaries:
                if recorded.position > self.boundaries[recorded.adapter]:
                    return True
        return recorded.position in self.positions


def expendable(store: EventStore, tenant: TenantId, before_us: int) -> Iterator[int]:
    """Positions of the tenant's events, older than `before_us`, whose bulk no pending request and no living adapter
    needs: bodies of requests and results, the server's own recovery points, and checkpoints that were deleted or have
    expired. What was removed before may be among them.

    The log must be at rest: no server may run on it.
    """
    needed = _needed(store, tenant)
    after = 0
    while page := store.read(after, limit=_PAGE, tenant=tenant):
        for recorded in page:
            if recorded.at_us >= before_us:
                return
            if (recorded.body is not None or recorded.blobs) and recorded not in needed:
                yield recorded.position
        after = page[-1].position


def _needed(store: EventStore, tenant: TenantId) -> _Needed:
    pending = [row.id for row in store.queries.pending(tenant)]
    living = [row.id for row in store.queries.adapters(tenant) if row.state == "ready"]
    marks: dict[AdapterId, Marks] = {}
    lost: set[AdapterId] = set()
    for adapter in living:
        try:
            marks[adapter] = find_marks(store, adapter)
        except StateLost:
            lost.add(adapter)
    origins = [each.origin for each in marks.values()]
    begun = [store.get(position) for position in [*pending, *map(covers, origins)]]
    named = {getattr(request.event, "checkpoint", None) for request in begun if request is not None}
    kept = {row.id for row in store.queries.checkpoints(tenant) if row.is_usable(time.time_ns() // 1000)}
    return _Needed(
        positions={*pending, *(origin.position for origin in origins)},
        boundaries={adapter: each.boundary for adapter, each in marks.items()},
        checkpoints={checkpoint for checkpoint in named if checkpoint is not None} | kept,
        lost=lost,
    )
