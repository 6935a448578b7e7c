"""How an HTTP connection to a Tinkerbell server is set up: address, key, time limits."""

import os
import time

import httpx

from tinkerbell.errors import InvalidRequest
from tinkerbell.sdk.calls import Call

DEFAULT_URL = "http://127.0.0.1:8080"
ANSWER_S = 60.0
"""How long an answer may take beyond what was agreed before the attempt counts as lost."""
CONNECT_S = 10.0
SHORTEST_S = 1.0
"""A server is given so long to answer even where the caller does not want to wait."""


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


def timeout(wait_s: float, left_s: float | None = None) -> httpx.Timeout:
    """Time limits of one attempt, `left_s` being all the time there is. Waiting for a free connection has none: the
    threads of a program take turns."""
    most_s = float("inf") if left_s is None else max(left_s, SHORTEST_S)
    return httpx.Timeout(
        min(ANSWER_S, most_s), connect=min(CONNECT_S, most_s), read=min(wait_s + ANSWER_S, most_s), pool=None
    )


def request(http: httpx.Client | httpx.AsyncClient, call: Call[object], until: float | None = None) -> httpx.Request:
    """One attempt of a call that is wanted until then, by time.monotonic()."""
    return http.build_request(
        call.method,
        call.path,
        content=call.body,
        params=call.params or None,
        headers=call.headers,
        timeout=timeout(call.wait_s, None if until is None else until - time.monotonic()),
    )


LIMITS = httpx.Limits(max_connections=64, max_keepalive_connections=32, keepalive_expiry=4.0)
"""Idle connections are dropped before any server or proxy would, so that a call seldom meets a closed one."""
