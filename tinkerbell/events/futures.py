"""Waiting for the answer of a request, from asyncio: one subscription for a whole process."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from tinkerbell.events.kinds import Failed, Recorded, Result, is_result
from tinkerbell.events.rows import FutureRow
from tinkerbell.events.store import EventStore
from tinkerbell.types import SYSTEM_TENANT


class FutureWaiter:
    """Wakes waiters when the log has their answer. Used from one event loop; start it before waiting."""

    def __init__(self, store: EventStore, read: Callable[..., Awaitable[Any]]) -> None:
        """`read`: calls something that may block for a tenant, in a thread: `await read(tenant, call, *args)`."""
        self._store = store
        self._read = read
        self._waiting: dict[int, set[asyncio.Future[Recorded | None]]] = {}
        self._watching: dict[str, set[asyncio.Event]] = {}
        """By tenant."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._stopped = False

    async def start(self) -> None:
        """Subscribe to the log."""
        self._loop = asyncio.get_running_loop()
        self._unsubscribe = await self._read(SYSTEM_TENANT, self._store.subscribe, self._on_events)

    async def stop(self) -> None:
        """Wake every waiter at once; from now on nobody waits."""
        self._stopped = True
        if self._unsubscribe is not None:
            self._unsubscribe()
        self._wake(dict.fromkeys(self._waiting))
        self._alert(list(self._watching))

    @property
    def stopped(self) -> bool:
        """Nobody waits any more."""
        return self._stopped

    @contextmanager
    def watching(self, tenant: str) -> Iterator[asyncio.Event]:
        """Meanwhile an event that is set whenever requests of the tenant are answered, and at `stop`; whoever waits for
        it clears it, and then looks at the log."""
        answered = asyncio.Event()
        self._watching.setdefault(tenant, set()).add(answered)
        try:
            yield answered
        finally:
            others = self._watching[tenant]
            others.discard(answered)
            if not others:
                del self._watching[tenant]

    async def wait(self, tenant: str, id: int, wait_s: float) -> tuple[FutureRow, Recorded | None] | None:
        """The tenant's future once it is answered, or as it is after `wait_s` seconds or at `stop`; None if the
        tenant has no such future. With it the answer, where it came while waiting."""
        assert self._loop is not None, "FutureWaiter.start was not called"
        answered: asyncio.Future[Recorded | None] = self._loop.create_future()
        # Registered before the row is read: an answer in between is not missed.
        self._waiting.setdefault(id, set()).add(answered)
        try:
            row = await self._read(tenant, self._store.queries.future, tenant, id)
            if row is None or row.state != "pending" or wait_s <= 0 or self._stopped:
                return None if row is None else (row, None)
            done, _ = await asyncio.wait([answered], timeout=wait_s)
            answer = answered.result() if done else None
            return (row, None) if answer is None else (_answered(row, answer), answer)
        finally:
            answered.cancel()
            others = self._waiting.get(id)
            if others is not None:
                others.discard(answered)
                if not others:
                    del self._waiting[id]

    def _on_events(self, events: Sequence[Recorded]) -> None:
        """On the store's tail thread."""
        # Who waits for one that cannot be read asks the log what has become of it.
        answers = {
            item.causation: item if isinstance(item.event, Result) else None
            for item in events
            if item.causation and is_result(item.event)
        }
        if answers and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, answers)
            self._loop.call_soon_threadsafe(self._alert, {item.tenant for item in events if is_result(item.event)})

    def _alert(self, tenants: Collection[str]) -> None:
        for tenant in tenants:
            for answered in self._watching.get(tenant, ()):
                answered.set()

    def _wake(self, answers: Mapping[int, Recorded | None]) -> None:
        for id_, answer in answers.items():
            for answered in self._waiting.get(id_, ()):
                if not answered.done():
                    answered.set_result(answer)


def _answered(row: FutureRow, answer: Recorded) -> FutureRow:
    """The row as the answer's fold leaves it, without asking the database again."""
    assert isinstance(answer.event, Result)
    return msgspec.structs.replace(
        row,
        state="failed" if isinstance(answer.event, Failed) else "completed",
        result_position=answer.position,
        cost_us=answer.event.cost_us,
        done_us=answer.at_us,
    )
