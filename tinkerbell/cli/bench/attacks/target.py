"""What an attack knows of the server, and how it sends bytes that no client of good will sends."""

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.synchronize import Event
from urllib.parse import urlsplit

import msgspec

PAUSE_S = 0.05
"""Before a connection that was refused is tried again."""
TIMEOUT_S = 60.0


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The server, and the attacker's place in it."""

    url: str
    key: str
    adapter: str
    """The attacker's own, ready."""
    run: str
    """One of the many that it had, removed since."""
    session: str

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None and parts.port is not None
        return parts.hostname, parts.port

    def head(self, method: str, path: str, length: int | None = None, media_type: str = "application/json") -> bytes:
        """The head of a request, with the key."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.address[0]}", f"Authorization: Bearer {self.key}"]
        if length is not None:
            lines += [f"Content-Type: {media_type}", f"Content-Length: {length}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    @contextmanager
    def connection(self) -> Iterator[socket.socket]:
        """A new one, whose end is of no importance to anybody."""
        with socket.create_connection(self.address, timeout=TIMEOUT_S) as opened:
            yield opened


class Caller:
    """One kept-alive connection whose answers do not matter: refusals are what is hoped for."""

    def __init__(self, target: Target) -> None:
        self._connection = http.client.HTTPConnection(*target.address, timeout=TIMEOUT_S)
        self._headers = {"Authorization": f"Bearer {target.key}"}

    def call(
        self, method: str, path: str, body: bytes | None = None, media_type: str = "application/json", **headers: str
    ) -> tuple[int, bytes]:
        """(status, answer); 0 where the connection broke."""
        given = {**self._headers, "Content-Type": media_type, **headers}
        try:
            self._connection.request(method, path, body, given)
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            time.sleep(PAUSE_S)
            return 0, b""
        if response.status in (429, 503):
            time.sleep(PAUSE_S)
        return response.status, answer

    def post(self, path: str, value: object) -> int | None:
        """Id of the future of a request; None where it was refused."""
        status, answer = self.call("POST", path, msgspec.json.encode(value))
        return json.loads(answer)["id"] if status == 202 else None


def again(stop: Event, attempt: Callable[[], None]) -> None:
    """Until the end, whatever the server makes of it."""
    while not stop.is_set():
        with suppress(OSError):
            attempt()
        time.sleep(PAUSE_S)
