"""One HTTP connection: as uvicorn has it, with a bound on a request's head and on the time that anything may take."""

import asyncio
import json
from http import HTTPStatus
from typing import Any, Literal

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from tinkerbell.api.connections import Connections
from tinkerbell.config import Http

LINGER_S = 10.0
"""What still comes after an answer is read on for so long, unseen: a client that has not stopped sending would not see
the answer of a connection that is closed."""

LINGER_BYTES = 4 * 1024 * 1024
"""So much of it, at most;"""
REFUSED_BYTES = 256 * 1024
"""and so much behind a head or body that is no request: whoever sends such does not read answers."""

_OF_A_HEADER = 4
"""Colon, space and line end."""

_FRAMING = 8
"""Bytes about a byte of a body, at most, on the average: a chunk of one has six in all."""


class Pace:
    """Whether bytes keep moving: after a grace, at a least rate on the average."""

    def __init__(self, limits: Http) -> None:
        self._grace_s = limits.transfer_grace_s
        self._rate = limits.min_bytes_per_s
        self.restart()

    def restart(self) -> None:
        """Something else is to be moved."""
        self._waited_s = 0.0
        self._num_bytes = 0

    def moved(self, num_bytes: int) -> None:
        """So many more."""
        self._num_bytes += num_bytes

    def late(self, passed_s: float) -> bool:
        """Whether too little has moved, `passed_s` of waiting later."""
        self._waited_s += passed_s
        return self._waited_s > self._grace_s + self._num_bytes / self._rate


class Connection(HttpToolsProtocol):
    """Refuses a head that is too long (431), and a head or body that comes too slowly (408); ends who does not read
    what it asked for, and who sends nothing. What waits for an answer may wait: a long poll, an event stream."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Http,
        crowd: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._crowd = crowd
        self.address = ""
        self._reading: Literal["nothing", "head", "body"] = "nothing"
        """What of a request is being read."""
        self._since_s = self.loop.time()
        """When this began: the wait for a first request, or a head."""
        self._head_bytes = 0
        """Of the request that is being read, so far."""
        self._message_began = False
        """In what came last, behind another one."""
        self._lingers_since_s: float | None = None
        """When a request was refused, or was answered whose body had not come."""
        self._unseen_bytes = 0
        """That came since."""
        self._is_refused = False
        """Nothing more is looked at."""
        self._body_bytes = 0
        """Of the request that is being read, so far,"""
        self._framing_bytes = 0
        """and what came with them: sizes and extensions of chunks, trailers."""
        self._upload = Pace(limits)
        self._download = Pace(limits)
        self._unsent_bytes = 0

    # ---- asyncio ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it, or refuse it."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client is not None else ""
        if not self._crowd.add(self):
            self._is_refused = True
            transport.write(_problem(503, "The server has as many connections as it takes; try again shortly."))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._crowd.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and see that a head that is not complete stays short."""
        if self._is_refused:
            self._count_unseen(len(data))
            return
        if self._reading == "nothing":
            self._begin_head()
        seen, self._message_began = self._head_bytes, False
        content, was_body = self._body_bytes, self._reading == "body"
        super().data_received(data)
        if self._reading == "body" and was_body:
            self._framing_bytes += len(data) - (self._body_bytes - content)
            if self._framing_bytes > self._limits.max_head_bytes + _FRAMING * self._body_bytes:
                self.refuse(400, "The body of the request has more between its chunks than in them.")
        if self._reading == "head" and not self._message_began:
            # The parser tells of a header when it is whole, and puts its pieces together in quadratic time.
            self._head_bytes = max(self._head_bytes, seen + len(data))
        if self._reading == "head" and self._head_bytes > self._limits.max_head_bytes:
            self.refuse(431, f"The head of a request may have at most {self._limits.max_head_bytes} bytes.")

    def resume_writing(self) -> None:
        """The other side has taken what was written."""
        self._download.restart()
        super().resume_writing()

    # ---- the parser ------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        if self._reading != "head":
            self._begin_head()
            self._message_began = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of it."""
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole one."""
        self._head_bytes += len(name) + len(value) + _OF_A_HEADER
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request to the app, unless its head was too long."""
        if self._head_bytes > self._limits.max_head_bytes:
            return
        self._reading = "body"
        self._upload.restart()
        self._body_bytes = self._framing_bytes = 0
        self._crowd.at_work(self)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of it."""
        if self._reading != "body":
            return
        self._upload.moved(len(body))
        self._body_bytes += len(body)
        if self._lingers_since_s is not None:
            self._count_unseen(len(body))
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is here."""
        if self._reading != "body":
            return
        self._reading = "nothing"
        if self._lingers_since_s is not None:
            self._lingers_since_s = None
            self._since_s = self.loop.time()
        super().on_message_complete()

    # ---- the app ---------------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """The connection rests, or goes on with the next request."""
        super().on_response_complete()
        if self._is_busy():
            return
        self._since_s = self.loop.time()
        self._crowd.at_rest(self)
        if self._reading == "body":
            self._linger()

    # ---- time ------------------------------------------------------------------------------------------------------

    def check(self, passed_s: float, now_s: float) -> None:
        """End it if it is too slow."""
        rested_s = now_s - self._since_s
        if self._is_stuck(passed_s):
            self.transport.abort()
        elif self._lingers_since_s is not None:
            if now_s - self._lingers_since_s > LINGER_S:
                self.transport.abort()
        elif self._reading == "body":
            if not self.flow.read_paused and self._upload.late(passed_s):
                self.refuse(408, "The body of the request came too slowly.")
        elif self._is_busy():
            self._since_s = now_s
        elif self._reading == "head":
            if rested_s > self._limits.head_timeout_s:
                self.refuse(408, "The head of the request did not come in time.")
        elif rested_s > (self._limits.head_timeout_s if self.cycle is None else self._limits.idle_timeout_s):
            self.transport.close()

    def evict(self) -> None:
        """Make room for another one."""
        self.transport.close()

    def refuse(self, status: int, detail: str) -> None:
        """Answer with a problem, unless an answer has begun, and end the connection."""
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        self._linger()
        cycle = self.cycle
        if self._is_busy():
            # Its app is told that nobody listens any more.
            cycle.disconnected = True
            cycle.message_event.set()
        if not self._is_busy() or not (cycle.response_started or self.pipeline):
            self.transport.write(_problem(status, detail))
        self.transport.write_eof()

    def _linger(self) -> None:
        self._lingers_since_s = self.loop.time()
        self._unseen_bytes = 0

    def _count_unseen(self, num_bytes: int) -> None:
        self._unseen_bytes += num_bytes
        if self._unseen_bytes > (REFUSED_BYTES if self._is_refused else LINGER_BYTES):
            self.transport.close()

    def _is_busy(self) -> bool:
        """Whether a request is being answered."""
        return (self.cycle is not None and not self.cycle.response_complete) or bool(self.pipeline)

    def _is_stuck(self, passed_s: float) -> bool:
        """Whether the other side does not take what was written."""
        unsent, before = self.transport.get_write_buffer_size(), self._unsent_bytes
        self._unsent_bytes = unsent
        if not unsent:
            self._download.restart()
            return False
        self._download.moved(max(before - unsent, 0))
        return self._download.late(passed_s)

    def _begin_head(self) -> None:
        self._reading = "head"
        self._since_s = self.loop.time()
        self._head_bytes = 0


def _problem(status: int, detail: str) -> bytes:
    """A whole response."""
    phrase = HTTPStatus(status).phrase
    slug = phrase.lower().replace(" ", "-")
    told = {"type": f"urn:tinkerbell:problem:{slug}", "title": f"{phrase}.", "status": status, "detail": detail}
    body = json.dumps(told).encode()
    head = {
        "content-type": "application/problem+json",
        "content-length": str(len(body)),
        "connection": "close",
        **({"retry-after": "1"} if status == 503 else {}),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return STATUS_LINE[status] + lines.encode() + b"\r\n" + body
