"""How a submitter learns what became of its submit: in a thread, or in an event loop that is woken once for a group."""

import asyncio
import logging
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

log = logging.getLogger(__name__)

Waiter = Future[Any] | asyncio.Future[Any]
"""Gets the result or the exception of a submit."""
Outcome = tuple[Waiter, Any]
"""Who waits, and its result or exception."""


def is_wanted(waiter: Waiter) -> bool:
    """Whether nobody has cancelled it. A thread's future cannot be cancelled any more after this."""
    if isinstance(waiter, Future):
        return waiter.set_running_or_notify_cancel()
    return not waiter.cancelled()


def deliver(outcomes: Iterable[Outcome]) -> None:
    """Settle the waiters, from any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Outcome]] = {}
    for waiter, outcome in outcomes:
        if isinstance(waiter, Future):
            _settle(waiter, outcome)
        else:
            by_loop.setdefault(waiter.get_loop(), []).append((waiter, outcome))
    for loop, settled in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle_all, settled)
        except RuntimeError as exc:
            # A closed loop runs nothing: nobody can be waiting.
            log.warning("%d submits were written for nobody: %s", len(settled), exc)


def deliver_rest(outcomes: Iterable[Outcome]) -> None:
    """`deliver`, to the waiters that have no outcome yet."""
    deliver([(waiter, outcome) for waiter, outcome in outcomes if not waiter.done()])


def _settle_all(outcomes: list[Outcome]) -> None:
    for waiter, outcome in outcomes:
        if not waiter.done():
            _settle(waiter, outcome)


def _settle(waiter: Waiter, outcome: Any) -> None:
    if isinstance(outcome, BaseException):
        waiter.set_exception(outcome)
    else:
        waiter.set_result(outcome)
