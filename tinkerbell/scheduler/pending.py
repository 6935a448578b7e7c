"""What waits: the accepted requests that have no result yet, in order, one queue for each adapter.

Pure: a fold over recorded events. Nothing here reads a clock, a database or a random number.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tinkerbell.events import kinds
from tinkerbell.events.kinds import Recorded
from tinkerbell.executors.port import ForwardBackwardDone, SampleDone
from tinkerbell.types import AdapterId, Category, TenantId

Lane = Literal["train", "sample", "control"]
"""Units of one lane can share a batch; a control batch is one request."""

LANES: dict[str, Lane] = {
    "forward": "train",
    "forward_backward": "train",
    "optim_step": "train",
    "sample": "sample",
    "add_lora": "control",
    "remove_lora": "control",
    "save": "control",
    "load": "control",
}
"""Kind of a request -> its lane."""

STATELESS_KINDS = frozenset({"add_lora", "load", "remove_lora"})
"""Kinds that replace or drop the adapter's state and so do not need it in the executor."""


BODY_KINDS = frozenset({"forward", "forward_backward", "sample"})
"""Kinds that come with a body."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why requests cannot run."""

    category: Category
    code: str
    message: str


@dataclass(slots=True, eq=False)
class PendingRequest:
    """One request and how far it has come. Progress is volatile: a new executor starts it afresh."""

    position: int
    """Of the request's event: the future's id."""
    tenant: TenantId
    adapter: AdapterId | None
    """None: the base model."""
    seq: int | None
    event: kinds.AnyRead
    kind: str
    lane: Lane
    lengths: tuple[int, ...] | None = None
    """Tokens of each datum; None until measured, and for kinds without data."""
    chunks: list[tuple[int, int]] = field(default_factory=list)
    """Ranges [start, stop) of its datums or samples that it runs in; one (0, 0) where it is not cut; empty until its
    body was read."""
    draws: list[tuple[int, int]] = field(default_factory=list)
    """Of a sample, for each chunk: which of the draws at the positions of its prompt, [start, stop); empty: the first
    makes all."""
    num_prompt_targets: int = 0
    """Of a sample, known once it is measured: targets at each position of its prompt."""
    outcomes: list[ForwardBackwardDone | SampleDone] = field(default_factory=list)
    """Answers of the chunks that ran, in order."""
    cost_us: int = 0
    """Charged so far, over all its batches."""
    deaths: int = 0
    """Batches of it in which the executor died."""
    batch: str | None = None
    """Id of the batch that ran a part of it last."""
    verdict: Reason | None = None
    """Why it fails when its turn comes, without being run."""

    @property
    def measured(self) -> bool:
        """Whether its chunks are known, so that it can be planned."""
        return bool(self.chunks)

    def measure(
        self,
        lengths: Sequence[int],
        chunks: Sequence[tuple[int, int]],
        draws: Sequence[tuple[int, int]] = (),
        num_prompt_targets: int = 0,
    ) -> None:
        """Its body was read: how long its datums are and where it is cut."""
        self.lengths = tuple(lengths)
        self.chunks = list(chunks)
        self.draws = list(draws)
        self.num_prompt_targets = num_prompt_targets

    def draws_of(self, index: int) -> tuple[int, int]:
        """Draws [start, stop) at the positions of a sample's prompt that chunk `index` makes."""
        if self.draws:
            return self.draws[index]
        assert isinstance(self.event, kinds.SampleRequested)
        return (0, self.event.params.prompt_draws) if index == 0 else (0, 0)

    @property
    def suspect(self) -> bool:
        """Whether it may have killed an executor: then it runs alone."""
        return self.deaths > 0

    @property
    def wants_logits(self) -> bool:
        """Whether its answer is large for its tokens."""
        event = self.event
        return isinstance(event, kinds.ForwardRequested) and event.outputs is not None and event.outputs.logits

    def chunk_tokens(self, index: int) -> int:
        """Tokens that chunk `index` takes of a batch's budget; for samples all they may become."""
        start, stop = self.chunks[index]
        if isinstance(self.event, kinds.SampleRequested):
            return self.event.num_tokens + (stop - start) * self.event.params.max_tokens
        if not self.lengths:
            return 0
        return sum(self.lengths[start:stop])


@dataclass(slots=True, eq=False)
class Queue:
    """The requests of one adapter, or of one tenant to the base model, in acceptance order."""

    tenant: TenantId
    adapter: AdapterId | None
    requests: deque[PendingRequest] = field(default_factory=deque)
    blocked: bool = False
    """Nothing of it may run until `Pending.unblock`."""

    @property
    def key(self) -> str:
        """Its name among the tenant's queues; empty for the base model."""
        return self.adapter or ""


class Pending:
    """Every pending request. A request leaves its queue at the front only, so nothing overtakes; a cancelled sample
    may leave it anywhere."""

    def __init__(self, after: int = 0) -> None:
        """Events up to position `after` are known already and ignored by `absorb`."""
        self.after = after
        self._requests: dict[int, PendingRequest] = {}
        self._tenants: dict[TenantId, dict[str, Queue]] = {}
        self._blocked: set[tuple[TenantId, AdapterId | None]] = set()
        self._ended: dict[AdapterId, Reason] = {}
        self._orphans: dict[AdapterId, tuple[TenantId, Reason]] = {}
        """Ended adapters with pending requests. They keep their reason: the log may know of the end before the
        requests it accepted until then are answered."""
        self._cancelled: set[int] = set()
        """Positions of pending samples."""

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[PendingRequest]:
        return iter(self._requests.values())

    def __contains__(self, position: int) -> bool:
        return position in self._requests

    @property
    def tenants(self) -> Collection[TenantId]:
        """Those that have a pending request."""
        return self._tenants.keys()

    def queues(self, tenant: TenantId) -> Collection[Queue]:
        """The tenant's queues that are not empty."""
        return self._tenants[tenant].values()

    def queue(self, tenant: TenantId, adapter: AdapterId | None) -> Queue | None:
        """One queue, None when it is empty."""
        return self._tenants.get(tenant, {}).get(adapter or "")

    # ---- the fold ----

    def absorb(self, recorded: Recorded) -> PendingRequest | None:
        """Take in the next event of the log; the request it added, if it added one."""
        if recorded.position <= self.after:
            return None
        event = recorded.event
        if kinds.is_request(event):
            return self.add(recorded)
        if kinds.is_result(event):
            if isinstance(event, kinds.RemoveLoraCompleted | kinds.AddLoraFailed) and recorded.adapter:
                # The log refuses requests to an ended adapter, so none can follow this event.
                self._ended.pop(recorded.adapter, None)
            request = self._requests.get(recorded.causation or 0)
            if request is not None:
                self._remove(request)
        if isinstance(event, kinds.SampleCancelled):
            self.cancel(event.request)
        return None

    def add(self, recorded: Recorded) -> PendingRequest:
        """Put a request at the end of its queue."""
        event = recorded.event
        assert kinds.is_request(event)
        kind = kinds.kind_of(event)
        request = PendingRequest(
            position=recorded.position,
            tenant=recorded.tenant,
            adapter=recorded.adapter,
            seq=recorded.seq,
            event=event,
            kind=kind,
            lane=LANES.get(kind, "control"),
        )
        if isinstance(event, kinds.Unreadable):
            request.verdict = Reason("server", "corrupt", f"request {request.position} cannot be read: {event.why}")
        if kind not in BODY_KINDS:
            request.chunks = [(0, 0)]
        queues = self._tenants.setdefault(request.tenant, {})
        queue = queues.get(request.adapter or "")
        if queue is None:
            queue = queues[request.adapter or ""] = Queue(request.tenant, request.adapter)
            queue.blocked = (request.tenant, request.adapter) in self._blocked
        assert not queue.requests or queue.requests[-1].position < request.position
        queue.requests.append(request)
        self._requests[request.position] = request
        if request.adapter in self._ended:
            self._orphans[request.adapter] = (request.tenant, self._ended[request.adapter])
        return request

    def measure(self, request: PendingRequest, lengths: Sequence[int], chunks: Sequence[tuple[int, int]]) -> None:
        """Say how long a request's datums are and where it is cut."""
        request.lengths = tuple(lengths)
        request.chunks = list(chunks)

    # ---- what becomes of requests ----

    def finish(self, request: PendingRequest) -> None:
        """The request has its result. It must be at the front of its queue."""
        queue = self._tenants[request.tenant][request.adapter or ""]
        assert queue.requests[0] is request, f"request {request.position} would overtake {queue.requests[0].position}"
        self._remove(request)

    def block(self, tenant: TenantId, adapter: AdapterId | None) -> None:
        """Nothing of the queue may run: a result of it is still being written and later ones may not overtake it, or
        what it needs cannot be read now."""
        self._blocked.add((tenant, adapter))
        queue = self.queue(tenant, adapter)
        if queue:
            queue.blocked = True

    def unblock(self, tenant: TenantId, adapter: AdapterId | None) -> None:
        """It goes on."""
        self._blocked.discard((tenant, adapter))
        queue = self.queue(tenant, adapter)
        if queue:
            queue.blocked = False

    def cancel(self, position: int) -> None:
        """The caller wants no more of a sample; nothing changes for one that has its result."""
        if position in self._requests:
            self._cancelled.add(position)

    def take_cancelled(self) -> list[PendingRequest]:
        """Take the cancelled samples from wherever they wait, by position. Expects that nothing is in flight.

        They need not be at the front: samples have no seq, and no answer of another request changes with theirs.
        """
        taken = [self._requests[position] for position in sorted(self._cancelled)]
        for request in taken:
            self._remove(request)
        return taken

    def rewind(self) -> None:
        """The executor is a new one: requests that were under way start afresh."""
        for request in self._requests.values():
            if request.outcomes:
                request.outcomes.clear()

    def drop(self, tenant: TenantId, adapter: AdapterId) -> list[PendingRequest]:
        """Take every pending request of the adapter, in order, because none of them can run."""
        self._orphans.pop(adapter, None)
        queue = self.queue(tenant, adapter)
        dropped = list(queue.requests) if queue else []
        for request in dropped:
            self._remove(request)
        return dropped

    def end(self, tenant: TenantId, adapter: AdapterId, reason: Reason) -> None:
        """The adapter will never run again (removed, or never made): what waits for it, and what the log
        still accepts before it learns of this, are `orphans`."""
        self._ended[adapter] = reason
        if self.queue(tenant, adapter):
            self._orphans[adapter] = (tenant, reason)

    def orphans(self) -> list[tuple[TenantId, AdapterId, Reason]]:
        """Ended adapters that have pending requests, and why they ended."""
        return [(tenant, adapter, reason) for adapter, (tenant, reason) in self._orphans.items()]

    def _remove(self, request: PendingRequest) -> None:
        del self._requests[request.position]
        self._cancelled.discard(request.position)
        queues = self._tenants[request.tenant]
        queue = queues[request.adapter or ""]
        if queue.requests[0] is request:
            queue.requests.popleft()
        else:
            queue.requests.remove(request)
        if not queue.requests:
            del queues[request.adapter or ""]
            if not queues:
                del self._tenants[request.tenant]
