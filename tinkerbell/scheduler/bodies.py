"""Request bodies, decoded, in a bounded cache over the store."""

import asyncio
from collections import OrderedDict

from tinkerbell.errors import Corrupt
from tinkerbell.events.kinds import (
    ForwardBackwardBody,
    ForwardBackwardRequested,
    ForwardRequested,
    Recorded,
    SampleBody,
    SampleRequested,
)
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.batching import cut, cut_draws, cut_samples
from tinkerbell.scheduler.pending import BODY_KINDS, PendingRequest

RequestBody = ForwardBackwardBody | SampleBody


class Bodies:
    """Least recently used bodies go when the rest exceeds `max_bytes`; they are read again when needed."""

    def __init__(self, store: EventStore, batch_tokens: int, max_bytes: int = 256 * 1024 * 1024) -> None:
        """`batch_tokens`: most tokens of one batch, by which samples are cut."""
        self._store = store
        self._batch_tokens = batch_tokens
        self._max_bytes = max_bytes
        self._bytes = 0
        self._bodies: OrderedDict[int, tuple[RequestBody, int]] = OrderedDict()

    def take_inline(self, request: PendingRequest, recorded: Recorded) -> None:
        """Measure the request if its body came with its event; a larger one is read when its turn comes."""
        if request.verdict is None and request.kind in BODY_KINDS and recorded.body is not None:
            self._keep(request, self._decode(recorded))

    async def get(self, request: PendingRequest) -> RequestBody:
        """The body of the request, which is measured afterwards. Raises what reading it raises."""
        found = self._bodies.get(request.position)
        if found is not None:
            self._bodies.move_to_end(request.position)
            if not request.measured:
                self._measure(request, found[0])
            return found[0]
        body = await asyncio.to_thread(self._read, request.position)
        self._keep(request, body)
        return body

    def forget(self, request: PendingRequest) -> None:
        """It has its result."""
        found = self._bodies.pop(request.position, None)
        if found is not None:
            self._bytes -= found[1]

    def _read(self, position: int) -> RequestBody:
        recorded = self._store.get(position)
        if recorded is None:
            raise Corrupt(f"event {position} is missing")
        return self._decode(recorded)

    def _decode(self, recorded: Recorded) -> RequestBody:
        body = self._store.body(recorded)
        if not isinstance(body, ForwardBackwardBody | SampleBody):
            raise Corrupt(f"event {recorded.position} has no request body")
        return body

    def _measure(self, request: PendingRequest, body: RequestBody) -> None:
        event = request.event
        if isinstance(event, SampleRequested):
            most_tokens = event.num_tokens + event.params.max_tokens
            params = event.params
            samples = cut_samples(params.num_samples, most_tokens, self._batch_tokens)
            draws = cut_draws(event.num_tokens - 1, params.prompt_draws)
            # A unit has some of either, or of one only.
            num_units = max(len(samples), len(draws))
            samples += [(params.num_samples, params.num_samples)] * (num_units - len(samples))
            draws += [(params.prompt_draws, params.prompt_draws)] * (num_units - len(draws))
            assert isinstance(body, SampleBody)
            request.measure([], samples, draws, len(body.prompt_targets or b"") // len(body.prompt))
            return
        assert isinstance(event, ForwardRequested | ForwardBackwardRequested)
        assert isinstance(body, ForwardBackwardBody)
        lengths = [datum.num_tokens for datum in body.data]
        request.measure(lengths, cut(lengths, event.chunk_tokens))

    def _keep(self, request: PendingRequest, body: RequestBody) -> None:
        self._measure(request, body)
        size = _size(body)
        self.forget(request)
        self._bodies[request.position] = (body, size)
        self._bytes += size
        while self._bytes > self._max_bytes and len(self._bodies) > 1:
            _, (_, dropped) = self._bodies.popitem(last=False)
            self._bytes -= dropped


def _size(body: RequestBody) -> int:
    """Bytes, near enough for a bound on memory: tokens, targets and one array of loss inputs."""
    if isinstance(body, SampleBody):
        return len(body.prompt) + len(body.prompt_targets or b"")
    return sum(len(datum.tokens) + 2 * len(datum.targets) for datum in body.data)
