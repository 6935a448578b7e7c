"""Connections that are never used as they should."""

import selectors
import socket
import time
from contextlib import ExitStack, suppress
from multiprocessing.synchronize import Event

from tinkerbell.cli.bench.attacks.target import Caller, Target, again

NUM_SLOW = 200
NUM_IDLE = 1000
NUM_UNFINISHED = 40
NUM_STREAMS = 1000
BODY_BYTES = 48 * 1024 * 1024
LOOK_S = 0.2


def endless_header(target: Target, stop: Event) -> None:
    """A header without an end, as fast as it is taken."""

    def attempt() -> None:
        with target.connection() as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nX: ")
            while not stop.is_set():
                connection.sendall(b"a" * 65536)

    again(stop, attempt)


def slow_headers(target: Target, stop: Event) -> None:
    """200 heads that come a byte a second."""
    with ExitStack() as opened:
        connections = [opened.enter_context(target.connection()) for _ in range(NUM_SLOW)]
        sent = 0
        while not stop.is_set():
            for connection in connections:
                with suppress(OSError):
                    connection.sendall((b"GET / HTTP/1.1\r\nX: " + b"a" * 4096)[sent : sent + 1])
            sent += 1
            stop.wait(1.0)


def idle_connections(target: Target, stop: Event) -> None:
    """1,000 connections on which nothing is said."""
    connections: list[socket.socket] = []
    with ExitStack() as opened:
        while not stop.is_set():
            with suppress(OSError):
                while len(connections) < NUM_IDLE and not stop.is_set():
                    connections.append(opened.enter_context(target.connection()))
            stop.wait(LOOK_S)


def unfinished_bodies(target: Target, stop: Event) -> None:
    """40 bodies of 48 MB that lack their last byte."""
    path, part = f"/v1/adapters/{target.adapter}/fwdbwd", b" " * 1024 * 1024
    with ExitStack() as opened:
        connections: list[tuple[socket.socket, int]] = []
        for _ in range(NUM_UNFINISHED):
            with suppress(OSError):
                connection = opened.enter_context(target.connection())
                connection.sendall(target.head("POST", path, BODY_BYTES))
                connection.setblocking(False)
                connections.append((connection, 0))
        while not stop.is_set():
            for index, (connection, sent) in enumerate(connections):
                with suppress(OSError):
                    connections[index] = (connection, sent + connection.send(part[: BODY_BYTES - 1 - sent]))
            time.sleep(0.001)


def event_streams(target: Target, stop: Event) -> None:
    """1,000 streams of the attacker's events, and events for them."""
    caller, body = Caller(target), {"sdk_version": "0.38.0"}
    with ExitStack() as opened, selectors.DefaultSelector() as selector:
        for _ in range(NUM_STREAMS):
            if stop.is_set():
                return
            with suppress(OSError):
                connection = opened.enter_context(target.connection())
                connection.sendall(target.head("GET", "/v1/events"))
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_READ)
        while not stop.is_set():
            caller.post("/api/v1/create_session", body)
            for ready, _ in selector.select(LOOK_S):
                with suppress(OSError):
                    assert isinstance(ready.fileobj, socket.socket)
                    if not ready.fileobj.recv(65536):
                        selector.unregister(ready.fileobj)
