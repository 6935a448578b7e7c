"""Processes that decode long bodies: a decoder holds the interpreter's lock for all of a body, and the event loop, the
scheduler and its lease want it too."""

import contextlib
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections import deque

import msgspec

from tinkerbell.api.bodies import Decoded
from tinkerbell.api.threads import FairThreads
from tinkerbell.errors import TinkerbellError, Unavailable
from tinkerbell.types import AdapterId, TenantId

NUM_PROCESSES = 2
"""A tenant has one of them at a time, so that there is one for the others."""
MOST_WAITING = 16
"""Bodies of one tenant that wait for it."""
PATIENCE_S = 60.0
"""A process that takes longer for a body is ended."""
PREFIX_BYTES = 8
"""Before each message its length, little-endian."""

log = logging.getLogger("tinkerbell.api")


class Job(msgspec.Struct, frozen=True):
    """What is to be decoded, but for the bytes, which follow it."""

    target: str
    """Name of a type of `bodies.KINDS`."""
    max_elements: int
    max_tokens: int
    path_id: AdapterId | None
    keyed: bool
    """Whether `Decoded.hashed` is wanted."""


class Decoders:
    """Starts processes when they are first needed, and again when they died."""

    def __init__(self) -> None:
        self._threads = FairThreads("decode", NUM_PROCESSES, MOST_WAITING)
        self._idle: deque[_Process] = deque()
        self._all: set[_Process] = set()
        self._lock = threading.Lock()
        self._closed = False

    async def decode(self, tenant: TenantId, job: Job, raw: bytes) -> Decoded:
        """Raises InvalidRequest, TooLarge; TooManyRequests where many of the tenant's wait, Unavailable where the
        process ended."""
        return await self._threads.run(tenant, self._decode, job, raw)

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            self._closed = True
            for process in self._all:
                process.end()
        self._threads.close()

    def _decode(self, job: Job, raw: bytes) -> Decoded:
        process = self._take()
        try:
            answer = process.ask(job, raw)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            self._drop(process)
            log.warning("a process that decodes bodies ended over one of %d bytes: %r", len(raw), error)
            raise Unavailable("The body could not be decoded; try again, or send less at a time.") from error
        with self._lock:
            self._idle.append(process)
        if isinstance(answer, TinkerbellError):
            raise answer
        return answer

    def _take(self) -> "_Process":
        with self._lock:
            if self._closed:
                raise Unavailable("The server is stopping.")
            if self._idle:
                return self._idle.pop()
            process = _Process()
            self._all.add(process)
            return process

    def _drop(self, process: "_Process") -> None:
        with self._lock:
            self._all.discard(process)
            process.end()


class _Process:
    """A child with one end of a pair of sockets; it ends when the other end is gone, whatever ended this process."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(PATIENCE_S)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tinkerbell.api.decoding", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # One thread each is all it uses; a pool for every core would only take memory.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )

    def ask(self, job: Job, raw: bytes) -> Decoded | TinkerbellError:
        """Raises OSError, EOFError where there is no answer."""
        asked = msgspec.msgpack.encode(job)
        send(self._socket, asked)
        send(self._socket, raw)
        answer: Decoded | TinkerbellError = pickle.loads(receive(self._socket))
        return answer

    def end(self) -> None:
        """At once."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._process.kill()
        self._process.wait()
        self._socket.close()


def send(to: socket.socket, message: bytes) -> None:
    """A message. Raises OSError."""
    to.sendall(len(message).to_bytes(PREFIX_BYTES, "little"))
    to.sendall(message)


def receive(of: socket.socket) -> bytearray:
    """A message. Raises OSError, EOFError where the other side is gone."""
    return _read(of, int.from_bytes(_read(of, PREFIX_BYTES), "little"))


def _read(of: socket.socket, num_bytes: int) -> bytearray:
    buffer = bytearray(num_bytes)
    view, done = memoryview(buffer), 0
    while done < num_bytes:
        if not (got := of.recv_into(view[done:])):
            raise EOFError
        done += got
    return buffer
