"""Refuses a Host header that no URL can be made of, before anything tries to."""

import re

from litestar.middleware import ASGIMiddleware
from litestar.types import ASGIApp, Receive, Scope, Send

from tinkerbell.errors import InvalidRequest

_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._~%-]+)(:[0-9]{1,5})?")


class HostCheck(ASGIMiddleware):
    """400, as RFC 9112 section 3.2 asks for."""

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        """Raises InvalidRequest."""
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None or int((match[2] or b":0")[1:]) > 65535:
            raise InvalidRequest("send one Host header: a name or an address, and a port if you like")
        await next_app(scope, receive, send)
