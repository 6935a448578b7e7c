"""Who is asking: an API key's tenant, or the one local user of a server without keys."""

import asyncio
import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

import msgspec
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from tinkerbell.api.threads import FairThreads
from tinkerbell.config import Settings
from tinkerbell.errors import Forbidden, InvalidRequest, Unauthorized
from tinkerbell.events.queries import Queries
from tinkerbell.events.rows import KeyRow
from tinkerbell.types import LOCAL_TENANT, TenantId

T = TypeVar("T")

PUBLIC = {"public": True}
"""`opt` of a route that needs no key."""

REVOKED_TOO = {"revoked_too": True}
"""`opt` of a route that a revoked key may still ask: to be revoked."""

CACHE_TTL_S = 2.0
"""A revoked key opens nothing after this long, in every process."""

FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")
"""Headers by which a proxy tells that it is one."""

_CACHE_SIZE = 4096
_KEY = re.compile(r"(?:tml-)?tb-(k_[A-Za-z0-9_]{1,64})-([A-Za-z0-9_=-]{16,128})")
"""With `tml-` before it a key passes the tinker SDK's own check."""
_NO_HASH = hashlib.sha256(b"").hexdigest()
_REFUSED = "Send an API key: 'Authorization: Bearer tb-...' or 'X-API-Key: tb-...'."


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Whoever a request is from."""

    tenant: TenantId
    key_id: str | None
    """None in local mode."""
    admin: bool


LOCAL = Principal(tenant=LOCAL_TENANT, key_id=None, admin=True)


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    """Decides who a connection is from. Remembers keys and the absence of keys for CACHE_TTL_S."""

    def __init__(self, settings: Settings, queries: Queries, threads: FairThreads) -> None:
        self.loopback = is_loopback(settings.host)
        """Whether the settings bind the server to loopback; only then may it run without keys."""
        if settings.auth == "off" and not self.loopback:
            raise InvalidRequest(
                f"auth = off is for loopback only, and host is {settings.host!r}; use auth = keys"
                " (tinkerbell keys create)"
            )
        self._auth: Literal["auto", "keys", "off"] = settings.auth
        self._queries = queries
        self._threads = threads
        self._keys: dict[str, tuple[float, KeyRow]] = {}
        self._asking: dict[str, asyncio.Task[Any]] = {}
        self._keyless_until = 0.0
        self._keyless = False

    async def principal(
        self, connection: ASGIConnection[Any, Any, Any, Any], *, revoked_too: bool = False
    ) -> Principal:
        """Raises Unauthorized, or Forbidden where a local server is called by a foreign name."""
        if await self._is_keyless():
            _check_local(connection)
            return LOCAL
        match = _KEY.fullmatch(_credential(connection))
        if match is None:
            raise Unauthorized(_REFUSED)
        key_id, secret = match.groups()
        row = await self._key(key_id)
        digest = hashlib.sha256(secret.encode()).hexdigest()
        # Unknown keys are compared as well: the time taken must not tell which ids exist.
        matches = hmac.compare_digest(digest, row.key_hash if row else _NO_HASH)
        if row is None or not matches or not (row.revoked_us is None or revoked_too):
            raise Unauthorized("This API key is not valid.")
        return Principal(tenant=row.tenant, key_id=row.key_id, admin=row.admin)

    async def still_valid(self, principal: Principal) -> bool:
        """For answers that outlive their request's check: streams."""
        if principal.key_id is None:
            return await self._is_keyless()
        row = await self._key(principal.key_id)
        return row is not None and row.revoked_us is None

    async def _is_keyless(self) -> bool:
        if self._auth == "off":
            return True
        if self._auth == "keys" or not self.loopback:
            return False
        if time.monotonic() >= self._keyless_until:
            await self._once("", self._ask_whether_keyless())
        return self._keyless

    async def _key(self, key_id: str) -> KeyRow | None:
        cached = self._keys.get(key_id)
        if cached is not None and time.monotonic() < cached[0]:
            return cached[1]
        return await self._once(key_id, self._ask_for_key(key_id))

    async def _once(self, about: str, question: Coroutine[Any, Any, T]) -> T:
        """The answer to a question; who asks the same meanwhile gets the same: streams of a key do so at once."""
        asking = self._asking.get(about)
        if asking is None:
            asking = self._asking[about] = asyncio.ensure_future(question)
            asking.add_done_callback(lambda _: self._asking.pop(about))
        else:
            question.close()
        return await asyncio.shield(asking)

    async def _ask_whether_keyless(self) -> None:
        now = time.monotonic()
        self._keyless = not await self._threads.run(LOCAL_TENANT, self._queries.has_keys)
        self._keyless_until = now + CACHE_TTL_S

    async def _ask_for_key(self, key_id: str) -> KeyRow | None:
        now = time.monotonic()
        row = await self._threads.run(key_id, self._queries.key, key_id)
        # Only keys that exist are kept, so that guesses cannot fill the memory.
        if row is None:
            self._keys.pop(key_id, None)
            return None
        if len(self._keys) >= _CACHE_SIZE:
            self._keys.clear()
        self._keys[key_id] = (now + CACHE_TTL_S, row)
        return row


def _credential(connection: ASGIConnection[Any, Any, Any, Any]) -> str:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return connection.headers.get("x-api-key", "").strip()


def _check_local(connection: ASGIConnection[Any, Any, Any, Any]) -> None:
    """A web page can make its own name resolve to 127.0.0.1 (DNS rebinding); the Host header then gives it
    away. So do the headers of a proxy, which is here itself and lets in whoever reaches it."""
    for header in FORWARDED:
        if header in connection.headers:
            raise Forbidden(
                f"A server without keys answers its own machine only, and {header} says that this request came through"
                " a proxy; make a key (tinkerbell keys create)."
            )
    header = connection.headers.get("host", "")
    name = header.rsplit(":", 1)[0] if not header.endswith("]") else header
    if not is_loopback(name):
        raise Forbidden("A server without keys answers to localhost only; call it as localhost or 127.0.0.1.")


async def authenticate(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """App-level guard: every route that is not marked PUBLIC has a principal."""
    if not handler.opt.get("public"):
        context = connection.app.state.context
        revoked_too = bool(handler.opt.get("revoked_too"))
        principal = connection.scope["user"] = await context.gate.principal(connection, revoked_too=revoked_too)
        context.shares.enter(connection.scope, principal.tenant, principal.key_id, handler.opt.get("waits"))
