"""One id for all that a request causes: from its headers, or fresh; given back as X-Request-ID."""

import re
import secrets
from typing import Any

from litestar.datastructures import MutableScopeHeaders
from litestar.types import Message, Scope

_TRACEPARENT = re.compile(rb"^[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?$")
_REQUEST_ID = re.compile(rb"^[\x21-\x7e]{1,128}$")
_STATE_KEY = "tinkerbell_correlation"


def correlation_of(scope: Scope) -> str:
    """The trace id of a W3C `traceparent`, or a printable X-Request-ID, or 128 random bits; the same on every
    call."""
    state: dict[str, Any] = scope["state"]
    if _STATE_KEY not in state:
        state[_STATE_KEY] = _from_headers(dict(scope["headers"])) or secrets.token_hex(16)
    correlation: str = state[_STATE_KEY]
    return correlation


def _from_headers(headers: dict[bytes, bytes]) -> str | None:
    if (match := _TRACEPARENT.match(headers.get(b"traceparent", b""))) and set(match[1]) != {ord("0")}:
        return match[1].decode()
    if match := _REQUEST_ID.match(headers.get(b"x-request-id", b"")):
        return match[0].decode()
    return None


async def add_request_id(message: Message, scope: Scope) -> None:
    """`before_send` hook: every answer names its request."""
    if message["type"] == "http.response.start":
        MutableScopeHeaders.from_message(message)["X-Request-ID"] = correlation_of(scope)
