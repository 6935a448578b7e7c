"""The leader's writes: in order, off the event loop, and fatal to the leadership when one is refused."""

import asyncio
import concurrent.futures
from collections.abc import Callable

from tinkerbell.events.kinds import NewEvent, Recorded
from tinkerbell.events.store import EventStore

_MOST_IN_FLIGHT = 8

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
        self._apart: set[asyncio.Task[None]] = set()
        self._failure: Exception | None = None

    def submit(self, *events: NewEvent) -> None:
        """Write the events together, after everything submitted before."""
        loop = asyncio.get_running_loop()
        submitted = loop.run_in_executor(self._thread, self._submit, loop, events)
        self._track(self._in_order, asyncio.create_task(self._finish(submitted)))

    def submit_apart(self, *events: NewEvent) -> asyncio.Task[None]:
        """Write events with large blobs together, after everything submitted before is durable. What is
        submitted later does not wait for them."""
        task = asyncio.create_task(self._write_apart(set(self._in_order), events))
        self._track(self._apart, task)
        return task

    @property
    def failed(self) -> bool:
        """Whether nothing more is written."""
        return self._failure is not None

    async def room(self) -> None:
        """Wait while too much is on its way. Raises what made a write fail."""
        while len(self._in_order) >= _MOST_IN_FLIGHT:
            await asyncio.wait(self._in_order, return_when=asyncio.FIRST_COMPLETED)
        self.check()

    async def settle(self) -> None:
        """Wait until everything is durable. Raises what made a write fail."""
        while tasks := self._in_order | self._apart:
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
            self._on_failure()

    def close(self) -> None:
        """Writes on their way are left to the store."""
        self._thread.shutdown(wait=False)
        self._blob_thread.shutdown(wait=False)

    def _track(self, tasks: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def _submit(self, loop: asyncio.AbstractEventLoop, events: tuple[NewEvent, ...]) -> Written | None:
        return None if self._failure is not None else self._store.submit_from(loop, *events)

    async def _write_apart(self, before: set[asyncio.Task[None]], events: tuple[NewEvent, ...]) -> None:
        if before:
            await asyncio.wait(before)
        if self._failure is not None:
            return
        loop = asyncio.get_running_loop()
        await self._finish(loop.run_in_executor(self._blob_thread, self._submit, loop, events))

    async def _finish(self, submitted: "asyncio.Future[Written | None]") -> None:
        try:
            written = await submitted
            if written is not None:
                await written
        except Exception as exc:  # noqa: BLE001 - whatever it is, the leadership ends with it
            self.fail(exc)
