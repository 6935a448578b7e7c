"""Threads for what may block: submits have their own, so have reads and the gate; of none can one tenant have all."""

import asyncio
import contextlib
import contextvars
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from tinkerbell.errors import TooManyRequests
from tinkerbell.types import TenantId

P = ParamSpec("P")
T = TypeVar("T")

NUM_SUBMITS = 8
NUM_READS = 4
"""Few: they share one interpreter with the event loop and the scheduler, and each that computes makes these wait."""
NUM_GATE = 2
"""For who asks, which is found out before it is known whose turn it would be."""

RETRY_AFTER_S = 1.0


class FairThreads:
    """A fixed number of threads, at most half of them for one tenant; tenants that wait take turns.

    Belongs to one event loop.
    """

    def __init__(self, name: str, size: int, most_waiting: int | None = None) -> None:
        """`most_waiting`: calls of one tenant that may wait for a thread; one more is refused with 429."""
        self._pool = ThreadPoolExecutor(size, thread_name_prefix=f"tinkerbell-{name}")
        self._free = size
        self._share = max(1, size // 2)
        self._most_waiting = most_waiting
        self._running: Counter[TenantId] = Counter()
        self._lines: OrderedDict[TenantId, deque[asyncio.Future[None]]] = OrderedDict()
        """Of tenants with calls that wait; whose turn is next comes first."""

    async def run(self, tenant: TenantId, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the call gives, from a thread. Raises what it raises, TooManyRequests.

        A caller that is cancelled does not wait any longer; a call that has begun goes on, and keeps its thread.
        """
        await self._place(tenant)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def finished(working: "Future[T]") -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(self._finish, tenant, answer, working)

        try:
            working = self._pool.submit(contextvars.copy_context().run, partial(call, *args, **kwargs))
        except BaseException:
            self._give_back(tenant)
            raise
        working.add_done_callback(finished)
        return await answer

    def close(self) -> None:
        """Take no more calls; those that run end by themselves."""
        self._pool.shutdown(wait=False)

    async def _place(self, tenant: TenantId) -> None:
        if self._free and self._running[tenant] < self._share:
            self._take(tenant)
            return
        line = self._lines.setdefault(tenant, deque())
        if self._most_waiting is not None and len(line) >= self._most_waiting:
            raise TooManyRequests(
                f"{len(line)} calls of yours wait to be read already; ask for less at a time.",
                retry_after_s=RETRY_AFTER_S,
                place=len(line),
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back(tenant)
            raise

    def _take(self, tenant: TenantId) -> None:
        self._free -= 1
        self._running[tenant] += 1

    def _finish(self, tenant: TenantId, answer: "asyncio.Future[T]", working: "Future[T]") -> None:
        self._give_back(tenant)
        if answer.done():
            return
        if (error := working.exception()) is not None:
            answer.set_exception(error)
        else:
            answer.set_result(working.result())

    def _give_back(self, tenant: TenantId) -> None:
        self._free += 1
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        self._call_next()

    def _call_next(self) -> None:
        for tenant in list(self._lines):
            line = self._lines[tenant]
            while line and line[0].done():
                line.popleft()  # its caller is gone
            if not line:
                del self._lines[tenant]
            elif self._free and self._running[tenant] < self._share:
                self._take(tenant)
                line.popleft().set_result(None)
                self._lines.move_to_end(tenant)
                return


class Threads:
    """The HTTP edge's."""

    def __init__(self, max_waiting_reads: int) -> None:
        self.submits = FairThreads("submit", NUM_SUBMITS)
        """What is on its way into the log: tenants' limits bound how much waits."""
        self.reads = FairThreads("read", NUM_READS, max_waiting_reads)
        self.gate = FairThreads("gate", NUM_GATE)

    def close(self) -> None:
        """Take no more calls."""
        for threads in (self.submits, self.reads, self.gate):
            threads.close()
