"""What the requests of a tenant hold while they are under way: places, and bytes of their bodies."""

import asyncio
import logging
from collections import Counter
from typing import Any, Literal

from litestar.middleware import ASGIMiddleware
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from tinkerbell.api.bodies import SMALL_BYTES
from tinkerbell.config import Limits
from tinkerbell.errors import TooManyRequests, Unavailable
from tinkerbell.types import TenantId

Waits = Literal["poll", "stream"]
"""What a request is that may last: it waits for an answer, or follows the log."""

POLL: dict[str, Any] = {"waits": "poll"}
STREAM: dict[str, Any] = {"waits": "stream"}
"""`opt` of such routes."""

RETRY_AFTER_S = 1.0

log = logging.getLogger("tinkerbell.api")

_STATE_KEY = "tinkerbell_holds"


class Holds:
    """What one request holds."""

    def __init__(self, tenant: TenantId, key: str, waits: Waits | None) -> None:
        self.tenant = tenant
        self.key = key
        self.waits = waits
        self.num_bytes = 0


class Shares:
    """Counts what is held. Belongs to one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_key: Counter[str] = Counter()
        self._waiting: Counter[tuple[TenantId, Waits]] = Counter()
        self._bytes: Counter[TenantId] = Counter()
        self._bytes_in_all = 0

    def enter(self, scope: Scope, tenant: TenantId, key_id: str | None, waits: Waits | None) -> None:
        """A request begins. Raises TooManyRequests where too many are under way."""
        key = key_id or f"tenant {tenant}"
        limits = self._limits
        _refuse_over(self._by_key[key], limits.max_requests_per_key, "requests of this key are under way")
        if waits == "poll":
            _refuse_over(self._waiting[tenant, waits], limits.max_polls, "requests of yours wait for an answer")
        elif waits == "stream":
            _refuse_over(self._waiting[tenant, waits], limits.max_streams, "event streams of yours are open")
        self._by_key[key] += 1
        if waits is not None:
            self._waiting[tenant, waits] += 1
        scope["state"][_STATE_KEY] = Holds(tenant, key, waits)

    def hold_bytes(self, scope: Scope, num_bytes: int) -> None:
        """So many bytes of a request's body are to be in memory until it is answered.

        Raises TooManyRequests where too much of its tenant is already, Unavailable where of all are.
        """
        if num_bytes <= SMALL_BYTES:
            return
        holds: Holds = scope["state"][_STATE_KEY]
        limits, tenant = self._limits, holds.tenant
        more = num_bytes - holds.num_bytes
        if more <= 0:
            return
        # The first one is taken whatever it has: a limit below one body would let none in.
        if self._bytes[tenant] - holds.num_bytes > 0 and self._bytes[tenant] + more > limits.max_upload_bytes:
            raise TooManyRequests(
                f"{self._bytes[tenant]} bytes of bodies of yours are under way, and this one has {num_bytes}; there may"
                f" be {limits.max_upload_bytes}. Send fewer at a time.",
                retry_after_s=RETRY_AFTER_S,
            )
        if self._bytes_in_all - holds.num_bytes > 0 and self._bytes_in_all + more > limits.max_upload_bytes_in_all:
            raise Unavailable("The server is taking in as much as it can; try again shortly.", retry_after_s=1.0)
        holds.num_bytes += more
        self._bytes[tenant] += more
        self._bytes_in_all += more

    def leave(self, scope: Scope) -> None:
        """The request is answered, or broken off."""
        holds: Holds | None = scope["state"].pop(_STATE_KEY, None)
        if holds is None:
            return
        _lower(self._by_key, holds.key, 1)
        if holds.waits is not None:
            _lower(self._waiting, (holds.tenant, holds.waits), 1)
        _lower(self._bytes, holds.tenant, holds.num_bytes)
        self._bytes_in_all -= holds.num_bytes


class GiveBack(ASGIMiddleware):
    """Whatever became of a request, what it held is free again."""

    def __init__(self, shares: Shares) -> None:
        super().__init__()
        self._shares = shares

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        """Calls the app, and for a request that waits only as long as somebody waits for it."""
        try:
            if scope["route_handler"].opt.get("waits") == "poll":
                await _while_wanted(scope, receive, send, next_app)
            else:
                await next_app(scope, receive, send)
        finally:
            self._shares.leave(scope)


async def _while_wanted(scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
    """The app, ended where the client is gone before its answer is."""
    has_body, is_answered = asyncio.Event(), False
    if scope.get("method") == "GET":
        has_body.set()

    async def receive_body() -> Any:
        message = await receive()
        if not message.get("more_body", False):
            has_body.set()
        return message

    async def send_answer(message: Message) -> None:
        nonlocal is_answered
        is_answered = is_answered or (message["type"] == "http.response.body" and not message.get("more_body", False))
        await send(message)

    async def until_gone() -> None:
        await has_body.wait()
        while (await receive())["type"] != "http.disconnect":
            pass

    answering = asyncio.ensure_future(next_app(scope, receive_body, send_answer))
    gone = asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
        if answering.done() or is_answered:
            await answering
        else:
            log.info("%s %s: the client broke off", scope.get("method"), scope["path"])
    finally:
        for task in (answering, gone):
            task.cancel()
        await asyncio.wait((answering, gone))


def _refuse_over(count: int, most: int, what: str) -> None:
    if count >= most:
        raise TooManyRequests(f"{count} {what}; there may be {most}.", retry_after_s=RETRY_AFTER_S, place=count)


def _lower(counts: Counter[Any], name: Any, less: int) -> None:
    counts[name] -= less
    if counts[name] <= 0:
        del counts[name]
