"""Hands every committed event to the subscribers: exactly once each, in order, whichever process wrote it. What is read
from the database for that is read once for all of them, and without bodies."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import sqlalchemy as sa

from tinkerbell.errors import Corrupt, ServerError
from tinkerbell.events import reading
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.tables import log_head

log = logging.getLogger(__name__)

Callback = Callable[[Sequence[Recorded]], None]

POLL_S = 0.25
"""How often other processes' events are looked for."""
SLOW_POLL_S = 4.0
"""The same while the log cannot be read."""
PAGE_EVENTS = 1000
WINDOW_EVENTS = 1024
"""Most local events kept for handing over; what is older is read from the database."""


class _Subscription:
    def __init__(self, callback: Callback, cursor: int) -> None:
        self.callback = callback
        self.cursor = cursor
        """Last position handed over."""


class Tail:
    """One thread. Positions have no gaps, so a cursor that is one number misses nothing."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._subscriptions: list[_Subscription] = []
        self._window: deque[Recorded] = deque()
        """The newest local events, by position, without gaps."""
        self._awake = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tinkerbell-tail", daemon=True)
        self._thread.start()

    def push(self, committed: list[Recorded]) -> None:
        """Events that this process has just committed."""
        with self._changed:
            if not self._subscriptions:
                return
            if self._window and self._window[-1].position + 1 != committed[0].position:
                # Another process wrote in between.
                self._window.clear()
            self._window.extend(committed)
            while len(self._window) > WINDOW_EVENTS:
                self._window.popleft()
            self._awake = True
            self._changed.notify()

    def subscribe(self, callback: Callback, after: int) -> Callable[[], None]:
        """Call `callback` on the tail thread for every event above `after`. Returns the way to end it."""
        subscription = _Subscription(callback, after)
        with self._changed:
            self._subscriptions.append(subscription)
            self._awake = True
            self._changed.notify()

        def unsubscribe() -> None:
            with self._changed:
                if subscription in self._subscriptions:
                    self._subscriptions.remove(subscription)

        return unsubscribe

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the thread; events not handed over yet stay in the log."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        wait_s = POLL_S
        while True:
            with self._changed:
                if not self._awake and not self._closed:
                    self._changed.wait(wait_s)
                if self._closed:
                    return
                self._awake = False
                subscriptions = list(self._subscriptions)
            try:
                if subscriptions:
                    self._serve(subscriptions)
                wait_s = POLL_S
            except Exception as exc:
                # The thread goes on whatever it was: nobody would start it again.
                wait_s = min(2 * wait_s, SLOW_POLL_S)
                expected = isinstance(exc, (sa.exc.SQLAlchemyError, ServerError, OSError))
                told = exc.__cause__ or exc
                log.error("the log cannot be read, trying again in %s s: %s", wait_s, told, exc_info=not expected)

    def _serve(self, subscriptions: list[_Subscription]) -> None:
        """Bring every subscription to the head, a page at a time, so that one far behind does not delay the rest."""
        head = self._head()
        behind = [subscription for subscription in subscriptions if subscription.cursor < head]
        while behind and not self._closed:
            pages: dict[int, list[Recorded]] = {}
            for subscription in behind:
                # Whoever is at the same place gets the same page: it is read once.
                events = pages.get(subscription.cursor)
                if events is None:
                    events = pages[subscription.cursor] = self._next(subscription.cursor)
                if not events or events[0].position != subscription.cursor + 1:
                    raise Corrupt(f"event {subscription.cursor + 1} is missing from the log")
                subscription.cursor = events[-1].position
                self._deliver(subscription, events)
            behind = [item for item in behind if item.cursor < head and self._is_wanted(item)]
        with self._changed:
            lowest = min(subscription.cursor for subscription in subscriptions)
            while self._window and self._window[0].position <= lowest:
                self._window.popleft()

    def _head(self) -> int:
        """The newest position known without asking, or else the database's."""
        with self._changed:
            if self._window:
                return self._window[-1].position
        with self._engine.connect() as connection:
            return int(connection.execute(sa.select(log_head.c.position)).scalar_one())

    def _next(self, cursor: int) -> list[Recorded]:
        with self._changed:
            if self._window and self._window[0].position <= cursor + 1 <= self._window[-1].position:
                skip = cursor + 1 - self._window[0].position
                return list(islice(self._window, skip, skip + PAGE_EVENTS))
        with self._engine.connect() as connection:
            return reading.page(connection, cursor, PAGE_EVENTS, bodies=False)

    def _is_wanted(self, subscription: _Subscription) -> bool:
        with self._changed:
            return subscription in self._subscriptions

    def _deliver(self, subscription: _Subscription, events: list[Recorded]) -> None:
        if not self._is_wanted(subscription):
            return
        try:
            subscription.callback(events)
        except Exception:
            # The events count as handed over: a second time would break the promise to the others of the callback.
            log.exception("a subscriber failed on events %d to %d", events[0].position, events[-1].position)
