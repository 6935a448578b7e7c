"""What a leader does from time to time beside its work."""

import asyncio
import logging
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor

from tinkerbell.errors import TinkerbellError
from tinkerbell.scheduler import metrics

log = logging.getLogger("tinkerbell.scheduler")

PARTS = 10
"""How often it looks whether something is due, in the time after which something is."""

LONGEST_PAUSE_S = 600.0
SHORTEST_PAUSE_S = 0.05


class Chore(ABC):
    """One leadership's. What does not work out is tried again later: nothing waits for it."""

    put_off: str
    """What is said when it does not work out."""

    def __init__(self, every_s: float | None) -> None:
        """`every_s`: after how many seconds something is due; None: never."""
        self._every_s = every_s
        self.over = False
        """The leadership is: what takes its time may stop in the middle."""
        self._doing: Future[None] | None = None

    async def run(self) -> None:
        """Until it is cancelled."""
        if self._every_s is None:
            return
        # Of its own: the event loop's threads are few, and one of them renews the lease.
        thread = ThreadPoolExecutor(1, thread_name_prefix="scheduler-chore")
        try:
            await self._run(self._every_s, thread)
        finally:
            self.over = True
            thread.shutdown(wait=False)

    async def _run(self, every_s: float, thread: ThreadPoolExecutor) -> None:
        while True:
            self._doing = thread.submit(self.do, every_s)
            try:
                await asyncio.wrap_future(self._doing)
            except TinkerbellError as exc:
                self._count()
                log.warning("%s detail=%s", self.put_off, exc)
            except Exception:
                # Nobody waits for this task: it would end unseen, and with it the chore until the next leader.
                self._count()
                log.exception(self.put_off)
            await asyncio.sleep(min(max(every_s / PARTS, SHORTEST_PAUSE_S), LONGEST_PAUSE_S))

    @property
    def doing(self) -> Future[None] | None:
        """What it does, or did last."""
        return self._doing

    def _count(self) -> None:
        metrics.CHORE_FAILURES.labels(type(self).__name__).inc()

    @abstractmethod
    def do(self, every_s: float) -> None:
        """What is due. Blocking."""
