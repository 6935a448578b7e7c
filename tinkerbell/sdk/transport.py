"""How an HTTP connection to a Tinkerbell server is set up: address, key, time limits."""

import os

import httpx

from tinkerbell.errors import InvalidRequest
from tinkerbell.sdk.calls import Call

DEFAULT_URL = "http://127.0.0.1:8080"
ANSWER_S = 60.0
"""How long an answer may take beyond what was agreed before the attempt counts as lost."""


def base_url(given: str | None) -> httpx.URL:
    """The server's address: the argument, else TINKERBELL_URL, else a server on this machine."""
    url = given or os.environ.get("TINKERBELL_URL") or DEFAULT_URL
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as exc:
        raise InvalidRequest(f"server address {url!r}: {exc}") from exc
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidRequest(f"server address {url!r} is not of the form http://host:port")
    return parsed


def headers(api_key: str | None) -> dict[str, str]:
    """The headers of every call; the key is the argument, else TINKERBELL_API_KEY, else there is none."""
    key = api_key or os.environ.get("TINKERBELL_API_KEY")
    return {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def timeout(wait_s: float) -> httpx.Timeout:
    """Time limits of one attempt. Waiting for a free connection has none: the threads of a program take
    turns."""
    return httpx.Timeout(ANSWER_S, connect=10.0, read=wait_s + ANSWER_S, pool=None)


def request(http: httpx.Client | httpx.AsyncClient, call: Call[object]) -> httpx.Request:
    """One attempt of a call."""
    return http.build_request(
        call.method,
        call.path,
        content=call.body,
        params=call.params or None,
        headers=call.headers,
        timeout=timeout(call.wait_s),
    )


LIMITS = httpx.Limits(max_connections=64, max_keepalive_connections=32, keepalive_expiry=4.0)
"""Idle connections are dropped before a server would (uvicorn: 5 s), so that a call seldom meets a closed
one."""
