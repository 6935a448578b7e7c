"""What runs together: the next batch, as a function of what waits and whose turn it is.

The most-owed request decides the lane; the batch is filled in the order of what is owed, and ends where the
next in turn does not fit: nobody more owed is passed over for somebody smaller. Pure.
"""

import heapq
import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field

from tinkerbell.scheduler.fair_share import FairShare
from tinkerbell.scheduler.pending import STATELESS_KINDS, Lane, Pending, PendingRequest, Queue
from tinkerbell.types import AdapterId


def cut(lengths: Sequence[int], chunk_tokens: int) -> list[tuple[int, int]]:
    """Datum ranges [start, stop) of a request's micro-batches: consecutive datums while their total is at
    most `chunk_tokens`; a longer datum is alone. A rule of the request only, so that its bits are, too."""
    chunks: list[tuple[int, int]] = []
    start = total = 0
    for index, length in enumerate(lengths):
        if index > start and total + length > chunk_tokens:
            chunks.append((start, index))
            start, total = index, 0
        total += length
    if lengths:
        chunks.append((start, len(lengths)))
    return chunks


def cut_samples(num_samples: int, most_tokens: int, batch_tokens: int) -> list[tuple[int, int]]:
    """Ranges [start, stop) of a request's samples, each of `most_tokens` with its prompt: as many as fit in a batch,
    at least one. Each sample is drawn by itself, so its tokens do not depend on the cut."""
    together = max(1, batch_tokens // most_tokens)
    return [(start, min(start + together, num_samples)) for start in range(0, num_samples, together)]


DRAWS_TOGETHER = 16_384
"""Most draws at positions of a prompt that one unit makes: they take a second or two where a model is small."""


def cut_draws(num_positions: int, num_draws: int) -> list[tuple[int, int]]:
    """Ranges [start, stop) of the draws at each of a prompt's positions: at most DRAWS_TOGETHER in all, at least one at
    each. Each is drawn by itself, so its token does not depend on the cut."""
    together = max(1, DRAWS_TOGETHER // max(1, num_positions))
    return [(start, min(start + together, num_draws)) for start in range(0, num_draws, together)]


LOGITS_REQUESTS = 4
"""Most requests in a batch that want logits: each may have as many bytes of them as a request may."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one batch."""

    batch_tokens: int
    """Most tokens, unless the first unit alone has more."""
    max_adapters: int
    slack_us: float = float("inf")
    """How far (virtual microseconds) others may be served past a tenant that has work this batch cannot take
    (behind its own optim_step, or in another lane). 0 is strictest and gives small batches; inf never ends
    one early."""
    most_us: float = float("inf")
    """Longest estimated time, unless the first unit alone takes longer. What rides along does not count, nor do tokens
    that are sampled: those of a batch are sampled side by side, and batch_tokens bounds them."""


@dataclass(frozen=True, slots=True)
class Work:
    """One unit of a batch: a chunk of a request, or all of it."""

    request: PendingRequest
    chunk: int
    estimated_us: int

    @property
    def first(self) -> bool:
        return self.chunk == 0

    @property
    def last(self) -> bool:
        return self.chunk == len(self.request.chunks) - 1


@dataclass(frozen=True, slots=True)
class Plan:
    """A batch: its units, each adapter's in request order."""

    lane: Lane
    works: list[Work]

    @property
    def estimated_us(self) -> int:
        return sum(work.estimated_us for work in self.works)

    @property
    def requests(self) -> list[PendingRequest]:
        """Every request with a unit here, once, in the order of their first units."""
        return list(dict.fromkeys(work.request for work in self.works))


@dataclass(frozen=True, slots=True)
class Measure:
    """The next in turn cannot be planned before its datums' lengths are known."""

    request: PendingRequest


@dataclass(frozen=True, slots=True)
class Restore:
    """The next in turn needs its adapter's state, which the executor does not hold."""

    request: PendingRequest


Price = Callable[[PendingRequest, int], int]
"""Estimated microseconds (>= 1) of chunk `i` of a request."""


@dataclass(slots=True)
class _Cursor:
    """How far the batch has taken one queue."""

    queue: Queue
    upcoming: Iterator[PendingRequest]
    request: PendingRequest | None
    chunk: int
    closed: bool = False
    """Its optim_step is in the batch: nothing of it comes after."""
    used: bool = False

    @classmethod
    def of(cls, queue: Queue) -> "_Cursor":
        upcoming = iter(queue.requests)
        request = next(upcoming)
        return cls(queue, upcoming, request, len(request.outcomes))

    def advance(self) -> None:
        assert self.request is not None
        self.chunk += 1
        if self.chunk == len(self.request.chunks):
            self.closed = self.request.kind == "optim_step"
            self.request, self.chunk = next(self.upcoming, None), 0


@dataclass(slots=True)
class _Filling:
    """A batch being filled."""

    shares: FairShare
    price: Price
    lasts: Price
    room: int
    time_us: float
    """Left of the estimated time it may take."""
    works: list[Work] = field(default_factory=list)
    adapters: set[AdapterId] = field(default_factory=set)
    with_logits: set[int] = field(default_factory=set)
    """Positions of the requests that want logits."""

    def take(self, cursor: _Cursor, *, in_turn: bool = True) -> None:
        request = cursor.request
        assert request is not None
        estimate = self.price(request, cursor.chunk)
        self.shares.charge(request.tenant, cursor.queue.key, estimate, in_turn=in_turn)
        self.works.append(Work(request, cursor.chunk, estimate))
        self.room -= request.chunk_tokens(cursor.chunk)
        self.time_us -= self.lasts(request, cursor.chunk)
        if request.adapter is not None:
            self.adapters.add(request.adapter)
        if request.wants_logits:
            self.with_logits.add(request.position)
        cursor.used = True
        cursor.advance()


def plan(
    pending: Pending,
    shares: FairShare,
    price: Price,
    limits: Limits,
    resident: Container[AdapterId],
    lasts: Price | None = None,
) -> Plan | Measure | Restore | None:
    """The next batch, or what has to be done first; None when nothing can run. Charges `shares` for what it
    takes.

    `resident`: adapters whose state the executor holds. `lasts`: how much longer a unit makes its batch, where that is
    not its price. Expects that nothing is in flight.
    """
    if not pending:
        shares.rest()
        return None
    shares.backlog(pending.tenants)
    turns = [(*shares.time_of(tenant), tenant) for tenant in pending.tenants]
    heapq.heapify(turns)
    filling = _Filling(shares, price, lasts or price, limits.batch_tokens, limits.most_us)
    queues: dict[str, list[tuple[float, int, _Cursor]]] = {}
    cursors: dict[str, list[_Cursor]] = {}
    lane: Lane | None = None
    held_us = float("inf")
    while turns:
        time_us, arrival, tenant = turns[0]
        turn = queues.get(tenant)
        if turn is None:
            turn = queues[tenant] = _queues_of(tenant, pending, shares)
            cursors[tenant] = [cursor for *_, cursor in turn]
        if lane is not None:
            _skip(turn, lane)
        if not turn:
            heapq.heappop(turns)
            if any(cursor.request is not None for cursor in cursors[tenant]):
                # What it has left is for another lane, or behind its own optim_step.
                held_us = min(held_us, time_us)
            continue
        cursor = turn[0][-1]
        request = cursor.request
        assert request is not None
        first = not filling.works
        obstacle = _obstacle(request, resident)
        if obstacle is not None:
            if first:
                return obstacle
            break
        if not first and (request.suspect or time_us > held_us + limits.slack_us or not _fits(cursor, filling, limits)):
            break
        lane = request.lane
        filling.take(cursor)
        if lane == "control" or request.suspect:
            # A suspect runs alone, so that what it does is nobody else's loss.
            while cursor.request is request and _fits(cursor, filling, limits):
                filling.take(cursor, in_turn=False)
            break
        if cursor.request is None:
            heapq.heappop(turn)
        else:
            time_of_queue = shares.time_of_queue(tenant, cursor.queue.key)
            heapq.heapreplace(turn, (time_of_queue, cursor.request.position, cursor))
        heapq.heapreplace(turns, (shares.time_of(tenant)[0], arrival, tenant))
    if lane is None:
        return None
    if lane == "train":
        for cursor in itertools.chain.from_iterable(cursors.values()):
            _ride_along(cursor, filling)
    for tenant, taken in cursors.items():
        # A blocked queue has no cursor, and its tenant still wants service.
        drained = all(cursor.request is None for cursor in taken)
        last = drained and len(taken) == len(pending.queues(tenant))
        for cursor in taken:
            if cursor.request is None:
                shares.leave(tenant, cursor.queue.key, last)
    return Plan(lane, filling.works)


def _ride_along(cursor: _Cursor, filling: _Filling) -> None:
    """An optim_step right behind this batch's units comes too: one cycle for a pipelined training step."""
    following = cursor.request
    if cursor.used and not cursor.closed and following is not None and following.kind == "optim_step":
        alone = following.suspect or filling.works[0].request.suspect
        if not alone:
            filling.take(cursor, in_turn=False)


def _queues_of(tenant: str, pending: Pending, shares: FairShare) -> list[tuple[float, int, _Cursor]]:
    """The tenant's queues as a heap: the most-owed adapter first, then the oldest request."""
    queues = [queue for queue in pending.queues(tenant) if not queue.blocked]
    shares.backlog_queues(tenant, [queue.key for queue in queues])
    turn = [(shares.time_of_queue(tenant, q.key), q.requests[0].position, _Cursor.of(q)) for q in queues]
    heapq.heapify(turn)
    return turn


def _skip(turn: list[tuple[float, int, _Cursor]], lane: Lane) -> None:
    """Drop from the front the queues that have nothing for this batch."""
    while turn:
        cursor = turn[0][-1]
        if not cursor.closed and cursor.request is not None and cursor.request.lane == lane:
            return
        heapq.heappop(turn)


def _obstacle(request: PendingRequest, resident: Container[AdapterId]) -> Measure | Restore | None:
    if request.verdict is not None:
        return Measure(request)
    if request.adapter is not None and request.kind not in STATELESS_KINDS and request.adapter not in resident:
        return Restore(request)
    return None if request.measured else Measure(request)


def _fits(cursor: _Cursor, filling: _Filling, limits: Limits) -> bool:
    request = cursor.request
    assert request is not None
    joins = request.adapter is not None and request.adapter not in filling.adapters
    if joins and len(filling.adapters) >= limits.max_adapters:
        return False
    if request.wants_logits and len(filling.with_logits - {request.position}) >= LOGITS_REQUESTS:
        return False
    if request.chunk_tokens(cursor.chunk) > filling.room:
        return False
    return filling.lasts(request, cursor.chunk) <= filling.time_us
