"""Serving the app with uvicorn: one process, and an end within seconds whoever is still listening."""

import asyncio
import ipaddress
import math
import signal
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType

import uvicorn
from litestar import Litestar

from tinkerbell.api import descriptors
from tinkerbell.api.auth import is_loopback
from tinkerbell.api.connection import Connection
from tinkerbell.api.connections import Connections, Network
from tinkerbell.api.context import Context
from tinkerbell.errors import InvalidRequest, ServerError

GRACE_S = 3
"""Requests that are still running after this long are cut off."""

CHECK_S = 1.0
"""How often connections are looked at that may have waited too long."""


class ApiServer(uvicorn.Server):
    """uvicorn that wakes streams and long polls before it waits for them, and returns to its caller on a
    signal."""

    def __init__(
        self,
        app: Litestar,
        host: str,
        port: int,
        on_started: Callable[[str], None] | None = None,
        on_stopping: Callable[[], None] | None = None,
    ) -> None:
        self._context: Context = app.state.context
        limits = self._context.settings.http
        most = descriptors.most_connections(limits.max_connections)
        per_address = limits.max_connections_per_address or max(most // 2, 1)
        self._crowd = Connections(most, per_address, networks(limits.trusted_proxies))
        self._checked_s: float | None = None
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(limits.trusted_proxies),
                forwarded_allow_ips=[*limits.trusted_proxies],
                http=partial(Connection, limits=limits, crowd=self._crowd),  # type: ignore[arg-type]
                ws="none",
                timeout_keep_alive=math.ceil(limits.idle_timeout_s),
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._on_started = on_started
        self._on_stopping = on_stopping
        self.url = ""
        """Where it listens, once started."""

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listen, then tell where: port 0 has become a real one."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.should_exit:
            return
        address = self.servers[0].sockets[0].getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        self.url = f"http://{host}:{address[1]}"
        if self._on_started is not None:
            self._on_started(self.url)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's ten times a second: now and then look for connections that take too long."""
        now_s = asyncio.get_running_loop().time()
        if self._checked_s is None or now_s - self._checked_s >= CHECK_S:
            passed_s = CHECK_S if self._checked_s is None else now_s - self._checked_s
            self._checked_s = now_s
            # A loop that was busy did not read what had come; that is not the clients' time.
            self._crowd.check(min(passed_s, 2 * CHECK_S), now_s)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """uvicorn runs the lifespan's end only after the last connection, so whoever waits is woken here."""
        await self._context.stop()
        await super().shutdown(sockets)  # type: ignore[arg-type]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, and give control back: uvicorn would raise the signal again and end the process before its
        scheduler and store are closed. A second Ctrl-C does not wait."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        if not self.should_exit and self._on_stopping is not None:
            self._on_stopping()
        self.should_exit = True


def networks(texts: Sequence[str]) -> list[Network]:
    """Raises InvalidRequest for what is neither an address nor a network."""
    try:
        return [ipaddress.ip_network(text) for text in texts]
    except ValueError as error:
        raise InvalidRequest(f"settings: http.trusted_proxies: {error}") from error


def serve_api(
    app: Litestar,
    host: str,
    port: int,
    on_started: Callable[[str], None] | None = None,
    on_stopping: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT (in the main thread), then return; at most GRACE_S and a little later.

    `on_started` gets the URL once connections are accepted; port 0 takes a free one. `on_stopping` is called
    in the signal handler, so that other parts can end while connections do. Raises InvalidRequest for a host
    that the app's settings do not allow, ServerError where the port cannot be had.
    """
    context: Context = app.state.context
    if context.gate.loopback and not is_loopback(host):
        raise InvalidRequest(f"the settings bind to {context.settings.host}; {host} would be reachable from elsewhere")
    server = ApiServer(app, host, port, on_started, on_stopping)
    try:
        server.run()
    except SystemExit as error:
        # uvicorn's way to say that it could not bind; its own log has the reason.
        raise ServerError(f"cannot listen on {host}:{port}") from error
    if not server.started:
        raise ServerError(f"the server at {host}:{port} did not start; its log has the reason")
