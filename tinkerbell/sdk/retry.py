"""When a call is tried again, and after how long.

Every call that changes something carries an idempotency key that is the same in all its attempts, so trying
again is always safe: the server answers a request it knows with the future it gave out before.
"""

import logging
import random
import time
from collections.abc import Callable

import httpx
import msgspec

from tinkerbell.sdk.errors import Unreachable, error_of

log = logging.getLogger("tinkerbell.sdk")

AGAIN = frozenset({429, 502, 503, 504})
"""Statuses that say nothing about the request itself: full, restarting, or a proxy without its server."""


LOUD_ATTEMPT = 3
"""A hiccup is nobody's business; what fails this often is, once."""


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How long a call is worth trying. The default rides over a restart of the server."""

    give_up_after_s: float = 120.0
    """From the first failed attempt on; time in which the server answers does not count."""
    first_delay_s: float = 0.25
    longest_delay_s: float = 8.0

    def delay_s(self, attempt: int, asked_s: float | None, chance: float) -> float:
        """Seconds before attempt number `attempt` + 1.

        Doubling, with jitter over the upper half so that many clients do not return at once. What the
        server asked for (Retry-After) is never undercut. `chance` is in [0, 1).
        """
        doubled = min(self.longest_delay_s, self.first_delay_s * 2.0 ** min(attempt, 32))
        own = doubled * (0.5 + chance / 2)
        return own if asked_s is None else max(own, asked_s * (1 + chance / 10))


class Attempts:
    """The attempts of one call, whichever way it is sent."""

    def __init__(
        self,
        policy: RetryPolicy,
        what: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        until: float | None = None,
    ) -> None:
        """`until`: when, by the clock, the caller wants to hear that there is no answer."""
        self._until = until
        self._policy = policy
        self._what = what
        self._clock = clock
        self._failed = 0
        self._give_up_at: float | None = None

    def after_answer(self, response: httpx.Response, content: bytes) -> float | None:
        """None if the answer is final and good; seconds to wait if it is to be asked again.

        Raises the answer's problem when it is final, or when it would have to wait too long.
        """
        if response.is_success:
            self._failed, self._give_up_at = 0, None
            return None
        error = error_of(response.status_code, content)
        if response.status_code not in AGAIN:
            raise error
        return self._wait_s(error, str(error), _retry_after_s(response))

    def after_loss(self, exc: httpx.TransportError) -> float:
        """Seconds to wait after a connection that could not be made or broke. Raises Unreachable at the
        end."""
        reason = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
        if isinstance(exc, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
            raise Unreachable(f"{self._what}: {reason}") from exc
        try:
            return self._wait_s(Unreachable(f"{self._what}: no answer ({reason})"), f"no answer ({reason})", None)
        except Unreachable as error:
            raise error from exc

    def _wait_s(self, error: Exception, why: str, asked_s: float | None) -> float:
        now = self._clock()
        if self._give_up_at is None:
            self._give_up_at = now + self._policy.give_up_after_s
        # Jitter needs no secrecy, and the caller's own random stream stays untouched.
        delay = self._policy.delay_s(self._failed, asked_s, _JITTER.random())
        self._failed += 1
        if self._until is not None and now + delay > self._until:
            raise TimeoutError(f"{self._what}: {why}") from error
        if now + delay > self._give_up_at:
            raise error
        level = logging.WARNING if self._failed == LOUD_ATTEMPT else logging.DEBUG
        log.log(level, "%s: %s; trying again in %.2f s", self._what, why, delay)
        return delay


def _retry_after_s(response: httpx.Response) -> float | None:
    # RFC 9110 also allows a date; a Tinkerbell server sends seconds, and without them the back-off is our
    # own.
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


_JITTER = random.Random()
