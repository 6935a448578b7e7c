"""A gateway on the way to a server that loses the first answers of every kind of request."""

import http.client
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Loss = Literal["closed", "502"]
"""What the client sees instead of the answer: the connection's end, or the gateway's word."""

_IDS = re.compile(r"se_[a-z2-7]{20}[^/]*|ck_[a-z2-7]{20}")
_HOP = {"connection", "transfer-encoding", "keep-alive"}


class Gateway(ThreadingHTTPServer):
    """Passes requests on. `lost`: answers not given so far, by kind of request."""

    daemon_threads = True

    def __init__(self, upstream: str, loss: Loss, times: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.loss, self._times = urlsplit(upstream).netloc, loss, times
        self.lost: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.server_port}"

    def loses(self, kind: str) -> bool:
        """Whether the answer to this one is lost."""
        with self._lock:
            if self.lost[kind] >= self._times:
                return False
            self.lost[kind] += 1
            return True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gateway

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=120)
        try:
            sent = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            upstream.request(self.command, self.path, body, sent)
            answer = upstream.getresponse()
            content = answer.read()
        finally:
            upstream.close()
        if answer.status == 408 or not self.server.loses(self._kind()):
            self._answer(answer.status, content, dict(answer.getheaders()))
        elif self.server.loss == "closed":
            self.close_connection = True
        else:
            self._answer(502, b"<html>Bad Gateway</html>", {"Content-Type": "text/html"})

    def _kind(self) -> str:
        """Of the request: what it asks, not of whom."""
        about = self.headers.get("X-Tinker-Request-Type", "")
        return f"{self.command} {_IDS.sub('*', urlsplit(self.path).path)} {about}".strip()

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in {*_HOP, "content-length", "date", "server"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = _pass_on  # noqa: N815 - the names that http.server looks for

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def gateway(upstream: str, loss: Loss, times: int) -> Iterator[Gateway]:
    """One that runs."""
    server = Gateway(upstream, loss, times)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
