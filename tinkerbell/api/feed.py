"""What happens in the log, for the streams of its tenants: read once by the store's tail, whoever listens."""

import asyncio
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
from litestar.response import ServerSentEventMessage

from tinkerbell.api import views
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.store import EventStore
from tinkerbell.types import SYSTEM_TENANT, AdapterId, TenantId

WINDOW_EVENTS = 256
"""The newest events of a tenant that streams find in memory; one that is further behind reads the log."""

STREAMS_AT_ONCE = 8
"""Of one tenant that are woken together; the next ones come PAUSE_S later, so that a crowd of them leaves most of the
event loop to the others."""
PAUSE_S = 0.01


class Line(NamedTuple):
    """An event as streams send it; made once for all of them."""

    position: int
    adapter: AdapterId | None
    content: bytes


def line_of(recorded: Recorded) -> Line:
    """The server-sent event."""
    view = views.log_event(recorded)
    message = ServerSentEventMessage(id=recorded.position, event=view.type, data=msgspec.json.encode(view))
    return Line(recorded.position, recorded.adapter, message.encode())


class Window:
    """The newest events of one tenant, and its streams."""

    def __init__(self, after: int) -> None:
        self.after = after
        """Every event of the tenant with a position above this, up to the newest that the tail has handed over, is
        here."""
        self._lines: list[Line] = []
        self._bells: list[asyncio.Event] = []
        self._ringing: asyncio.Task[None] | None = None
        self._again = False

    def lines_after(self, position: int) -> list[Line]:
        """All of them; `position` must not be below `after`."""
        return self._lines[bisect_right(self._lines, position, key=lambda line: line.position) :]

    def add(self, events: Sequence[Recorded]) -> None:
        """The next ones."""
        self._lines += [line_of(recorded) for recorded in events[-WINDOW_EVENTS:]]
        if len(events) > WINDOW_EVENTS:
            self.after = events[-WINDOW_EVENTS - 1].position
        if (gone := len(self._lines) - WINDOW_EVENTS) > 0:
            self.after = max(self.after, self._lines[gone - 1].position)
            del self._lines[:gone]
        self.ring()

    @property
    def empty(self) -> bool:
        """Whether no stream is left."""
        return not self._bells

    def join(self, bell: asyncio.Event) -> None:
        """One more stream."""
        self._bells.append(bell)

    def leave(self, bell: asyncio.Event) -> None:
        """One less."""
        self._bells.remove(bell)

    def ring(self) -> None:
        """Wake all streams, a few at a time."""
        self._again = True
        if self._ringing is None:
            self._ringing = asyncio.get_running_loop().create_task(self._ring())

    def ring_last(self) -> None:
        """Wake all at once."""
        for bell in self._bells:
            bell.set()

    async def _ring(self) -> None:
        while self._again:
            self._again = False
            bells = list(self._bells)
            for start in range(0, len(bells), STREAMS_AT_ONCE):
                if start:
                    await asyncio.sleep(PAUSE_S)
                for bell in bells[start : start + STREAMS_AT_ONCE]:
                    bell.set()
            if len(bells) > STREAMS_AT_ONCE:
                await asyncio.sleep(PAUSE_S)
        self._ringing = None


class Feed:
    """One subscription to the log for all streams of this process. A slow stream costs nothing: events that leave the
    window before it takes them are read from the log, at its own pace."""

    def __init__(self, store: EventStore, read: Callable[..., Awaitable[Any]]) -> None:
        """`read`: as FutureWaiter has it."""
        self._store = store
        self._read = read
        self._head = 0
        """The newest position that the tail has handed over."""
        self._windows: dict[TenantId, Window] = {}
        self._unsubscribe: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Subscribe; the running loop is the one that streams run in."""
        self._loop = asyncio.get_running_loop()
        self._head = await self._read(SYSTEM_TENANT, self._store.head)
        self._unsubscribe = self._store.subscribe(self._heard, after=self._head)

    def stop(self) -> None:
        """Unsubscribe and wake every stream a last time."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        for window in self._windows.values():
            window.ring_last()

    @contextmanager
    def window(self, tenant: TenantId) -> Iterator[tuple[Window, asyncio.Event]]:
        """The tenant's window, and an event that is set whenever it has grown; the listener clears it before it
        looks."""
        window = self._windows.get(tenant)
        if window is None:
            window = self._windows[tenant] = Window(self._head)
        bell = asyncio.Event()
        window.join(bell)
        try:
            yield window, bell
        finally:
            window.leave(bell)
            if window.empty:
                del self._windows[tenant]

    def _heard(self, events: Sequence[Recorded]) -> None:
        """On the store's tail thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take, events)

    def _take(self, events: Sequence[Recorded]) -> None:
        self._head = events[-1].position
        for tenant in {recorded.tenant for recorded in events} & self._windows.keys():
            self._windows[tenant].add([recorded for recorded in events if recorded.tenant == tenant])
