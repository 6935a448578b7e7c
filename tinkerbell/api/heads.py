"""Refuses heads that name what cannot be: a Host that no URL can be made of, texts that no database holds. What
handlers are given of a path, a query or a header has been here."""

import re
from urllib.parse import unquote_to_bytes

from litestar.middleware import ASGIMiddleware
from litestar.types import ASGIApp, Receive, Scope, Send

from tinkerbell.errors import InvalidRequest, NotFound

_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._~%-]+)(:[0-9]{1,5})?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CONTROL_BYTES = re.compile(rb"[\x00-\x1f\x7f]")
_SHORT = re.compile(rb"[\x20-\x7e]{1,200}")

STORED = (b"idempotency-key", b"x-idempotency-key", b"x-sdk-version")
"""Headers that are written into the log."""


class HeadCheck(ASGIMiddleware):
    """400, as RFC 9112 section 3.2 asks for of a Host; 404 of a path."""

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        """Raises InvalidRequest, NotFound."""
        headers = scope["headers"]
        hosts = [value for name, value in headers if name == b"host"]
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None or int((match[2] or b":0")[1:]) > 65535:
            raise InvalidRequest("send one Host header: a name or an address, and a port if you like")
        if _CONTROL.search(scope["path"]):
            raise NotFound("There is nothing whose name has a control character.")
        if _CONTROL_BYTES.search(unquote_to_bytes(scope["query_string"])):
            raise InvalidRequest("the query has a control character, which no parameter takes")
        for name, value in headers:
            if name in STORED and not _SHORT.fullmatch(value):
                raise InvalidRequest(f"{name.decode()}: 1 to 200 printable ASCII characters.")
        await next_app(scope, receive, send)
