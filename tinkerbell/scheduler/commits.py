"""The leader's writes: in order, off the event loop, and fatal to the leadership when one is refused.

What brings large blobs is written beside the others. A blob store that takes none for now refuses nobody: such writes
are tried again, and only what waits for them waits.
"""

import asyncio
import concurrent.futures
import logging
from collections.abc import Callable, Sequence
from typing import Any

from tinkerbell.errors import AlreadyAnswered, Fenced, NotFound, StorageUnavailable, Unavailable
from tinkerbell.events.kinds import NewEvent, Recorded, is_result
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler import metrics
from tinkerbell.scheduler.host import wait_for

log = logging.getLogger("tinkerbell.scheduler")

_MOST_IN_FLIGHT = 8
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0

_NOT_OVER_EVENTS = (Unavailable, Fenced, AlreadyAnswered, NotFound)
"""Why a write is refused whatever is in it: the database is away, or another leads."""

Written = asyncio.Future[list[Recorded]]


class Commits:
    """Submits events in the order of the calls. The first failure is kept: nothing is submitted after it,
    because what the leader believes is then no longer what the log says. What was submitted before it is known may
    still be written; the log refuses what then has no place in it."""

    def __init__(self, store: EventStore, on_failure: Callable[[], None]) -> None:
        """`on_failure` is called once, on the event loop."""
        self._store = store
        self._on_failure = on_failure
        # One thread, so that encoding keeps the order of the calls and leaves the loop alone.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="scheduler-commits")
        self._blob_thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="scheduler-blobs")
        self._in_order: set[asyncio.Task[None]] = set()
        self._apart: dict[asyncio.Task[Any], int] = {}
        """Bytes of blobs of what is written beside the others."""
        self._first_attempts: set[asyncio.Future[None]] = set()
        self._over = asyncio.Event()
        self._failure: Exception | None = None
        self.refused: list[int] = []
        """Positions of the requests with whose results a write was refused, which no trying again would mend."""

    def submit(self, *events: NewEvent) -> None:
        """Write the events together, after everything submitted before."""
        loop = asyncio.get_running_loop()
        submitted = loop.run_in_executor(self._thread, self._submit, loop, events)
        task = asyncio.create_task(self._finish(submitted, events))
        self._in_order.add(task)
        task.add_done_callback(self._in_order.discard)

    def submit_apart(self, *events: NewEvent) -> "asyncio.Task[None]":
        """Write events with large blobs together, after everything submitted before is durable, however long the blob
        store takes none. What is submitted later does not wait for them."""
        tried: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._first_attempts.add(tried)
        tried.add_done_callback(self._first_attempts.discard)
        task = asyncio.create_task(self._insist(set(self._in_order), events, tried))
        self._keep_apart(task, events)
        return task

    def offer(self, event: NewEvent) -> "asyncio.Task[Exception | None]":
        """Write an event that the log can do without, once, after everything submitted before is durable. The task
        gives what went wrong; only a lost lease ends the leadership."""
        task = asyncio.create_task(self._try(set(self._in_order), event))
        self._keep_apart(task, [event])
        return task

    @property
    def failed(self) -> bool:
        """Whether nothing more is written."""
        return self._failure is not None

    @property
    def num_bytes_apart(self) -> int:
        """Bytes of blobs on their way, which are in memory until they are written."""
        return sum(self._apart.values())

    async def one_less_apart(self) -> None:
        """Wait until one of those that are written beside the others is written, or there is none."""
        if self._apart:
            await asyncio.wait(self._apart, return_when=asyncio.FIRST_COMPLETED)

    async def room(self) -> None:
        """Wait while too much is on its way. Raises what made a write fail."""
        while len(self._in_order) >= _MOST_IN_FLIGHT:
            await asyncio.wait(self._in_order, return_when=asyncio.FIRST_COMPLETED)
        self.check()

    async def settle(self) -> None:
        """Wait until everything is durable but what is only offered, and what the blob store does not take: that holds
        up nobody else. Raises what made a write fail."""
        while tasks := self._in_order | self._first_attempts:
            await asyncio.wait(tasks)
        self.check()

    def check(self) -> None:
        """Raises what made a write fail."""
        if self._failure is not None:
            raise self._failure

    def fail(self, exc: Exception) -> None:
        """Write nothing more: a write was refused, or the lease is lost."""
        if self._failure is None:
            self._failure = exc
            self._over.set()
            self._on_failure()

    def close(self) -> None:
        """Writes on their way are left to the store."""
        self._over.set()
        self._thread.shutdown(wait=False)
        self._blob_thread.shutdown(wait=False)

    def _keep_apart(
        self, task: "asyncio.Task[None] | asyncio.Task[Exception | None]", events: Sequence[NewEvent]
    ) -> None:
        self._apart[task] = sum(len(data) for event in events for data in event.blobs.values())
        task.add_done_callback(lambda done: self._apart.pop(done, None))

    def _submit(self, loop: asyncio.AbstractEventLoop, events: tuple[NewEvent, ...]) -> Written | None:
        return None if self._failure is not None else self._store.submit_from(loop, *events)

    async def _write_apart(self, events: tuple[NewEvent, ...]) -> None:
        loop = asyncio.get_running_loop()
        written = await loop.run_in_executor(self._blob_thread, self._submit, loop, events)
        if written is not None:
            await written

    async def _insist(
        self, before: set[asyncio.Task[None]], events: tuple[NewEvent, ...], tried: asyncio.Future[None]
    ) -> None:
        pause_s = FIRST_PAUSE_S
        try:
            if before:
                await asyncio.wait(before)
            while not self._over.is_set():
                try:
                    await self._write_apart(events)
                except StorageUnavailable as exc:
                    metrics.STORAGE_REFUSALS.inc()
                    log.error("the blob store takes no results, tried again in %g s detail=%s", pause_s, exc)
                else:
                    return
                if not tried.done():
                    tried.set_result(None)
                await wait_for(self._over, pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the leadership ends with it
            self._refuse(exc, events)
        finally:
            if not tried.done():
                tried.set_result(None)

    async def _try(self, before: set[asyncio.Task[None]], event: NewEvent) -> Exception | None:
        try:
            if before:
                await asyncio.wait(before)
            await self._write_apart((event,))
        except Fenced as exc:
            self.fail(exc)
            return exc
        except Exception as exc:  # noqa: BLE001 - whoever offered it decides
            return exc
        return self._failure

    async def _finish(self, submitted: "asyncio.Future[Written | None]", events: tuple[NewEvent, ...]) -> None:
        try:
            written = await submitted
            if written is not None:
                await written
        except Exception as exc:  # noqa: BLE001 - whatever it is, the leadership ends with it
            self._refuse(exc, events)

    def _refuse(self, exc: Exception, events: Sequence[NewEvent]) -> None:
        if self._failure is None and not isinstance(exc, _NOT_OVER_EVENTS):
            answers = [event for event in events if is_result(event.event)]
            over = [event for event in answers if not self._store.takes(event)] or answers
            self.refused = [event.causation for event in over if event.causation is not None]
        self.fail(exc)
