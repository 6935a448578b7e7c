"""One server process: store, scheduler and HTTP edge started in that order and ended within seconds."""

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
import msgspec

from tinkerbell.api import descriptors
from tinkerbell.api.app import create_app
from tinkerbell.api.auth import is_loopback
from tinkerbell.api.server import serve_api
from tinkerbell.cli.database import prepare, shown, where
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore
from tinkerbell.files import write_private
from tinkerbell.scheduler.service import SchedulerService

SCHEDULER_GRACE_S = 3.0
"""With the executor's own end and the store's this stays below the 5 s that a server may take to end."""
LOOK_S = 0.5

SWITCH_S = 0.0005
"""How long a thread that computes keeps the interpreter from one that has something to do. Python's own 5 ms are paid
at every answer of the database and of a socket, beside somebody's reads, a dozen times a request."""

log = logging.getLogger("tinkerbell.server")


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """Content of the ready file."""

    pid: int
    role: str
    url: str | None
    """None where the role has no HTTP."""


class Interrupted(BaseException):
    """A signal came before the server was up, or after it was down."""


class Server:
    """Runs in the main thread, whose signals it takes."""

    def __init__(self, settings: Settings, role: str, ready_file: Path | None) -> None:
        self._settings = settings
        self._role = role
        self._ready_file = ready_file
        self._store: EventStore | None = None
        self._scheduler: SchedulerService | None = None
        self._ending: threading.Thread | None = None

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises SchemaOutdated on an old schema, click.UsageError for a host that would be open to everybody,
        and what the executor raised if it cannot start.
        """
        sys.setswitchinterval(SWITCH_S)
        try:
            with _signals_interrupt():
                self._run()
        except Interrupted as exc:
            raise SystemExit(128 + exc.args[0]) from None

    def _run(self) -> None:
        descriptors.raise_limit()
        if prepare(self._settings):
            log.info("made the tables of an empty database", extra={"database": shown(self._settings.url)})
        self._store = EventStore.open(self._settings)
        try:
            self._store.require_keys()
            self._refuse_exposure(self._store)
            self._start_scheduler(self._store)
            if self._role == "scheduler":
                self._wait(self._store)
            else:
                self._serve_http(self._store)
        finally:
            self._end()

    def _refuse_exposure(self, store: EventStore) -> None:
        """Beyond loopback nobody is let in without a key, so a server without one would only be a door."""
        host = self._settings.host
        if self._role == "scheduler" or is_loopback(host):
            return
        if not num_valid_keys(store):
            raise click.UsageError(
                f"{host} can be reached from other machines, and there is no API key. Make one first: "
                f"tinkerbell keys create TENANT{where(self._settings)}"
            )

    def _start_scheduler(self, store: EventStore) -> None:
        if self._role == "api":
            return
        log.info(
            "starting the executor",
            extra={"executor": self._settings.executor, "model": self._settings.model},
        )
        scheduler = SchedulerService(store, self._settings)
        try:
            scheduler.start()
        except Interrupted:
            # Nothing has run, so nothing can be lost; the executor may be in the middle of loading gigabytes.
            if scheduler.executor_pid is not None:
                os.kill(scheduler.executor_pid, signal.SIGKILL)
            raise
        self._scheduler = scheduler

    def _serve_http(self, store: EventStore) -> None:
        scheduler = self._scheduler
        if scheduler is None:
            app = create_app(self._settings, store)
        else:
            app = create_app(
                self._settings,
                store,
                scheduler_failed=lambda: scheduler.failed,
                executor_away=lambda: scheduler.executor_away,
            )
        serve_api(
            app,
            self._settings.host,
            self._settings.port,
            on_started=self._announce,
            on_stopping=self._begin_end,
        )

    def _wait(self, store: EventStore) -> None:
        """The scheduler role's main thread: until a signal, or until the scheduler or the store fails."""
        assert self._scheduler is not None
        stop = threading.Event()
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, lambda *_: stop.set())
        self._announce(None)
        while not stop.wait(LOOK_S):
            if (failed := self._scheduler.failed or store.failure()) is not None:
                raise failed

    def _begin_end(self) -> None:
        """Stop the scheduler while HTTP connections end; called once, from a signal handler."""
        if self._scheduler is not None and self._ending is None:
            log.info("stopping")
            self._ending = threading.Thread(
                target=self._scheduler.stop, args=(SCHEDULER_GRACE_S,), name="stop-scheduler"
            )
            self._ending.start()

    def _end(self) -> None:
        # A second signal must not leave the lease and the store open.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._begin_end()
        if self._ending is not None:
            self._ending.join()
        if self._store is not None:
            self._store.close()
        log.info("stopped")

    def _announce(self, url: str | None) -> None:
        assert self._store is not None
        # What was loaded so far stays for good: a full collection need not look through it, tens of milliseconds.
        gc.collect()
        gc.freeze()
        click.echo(banner(self._settings, self._role, url, self._store))
        if self._ready_file is not None:
            # Renamed into place, so that whoever waits for it never reads half of it.
            part = self._ready_file.with_name(self._ready_file.name + ".part")
            write_private(part, msgspec.json.encode(Ready(pid=os.getpid(), role=self._role, url=url)))
            part.rename(self._ready_file)


def num_valid_keys(store: EventStore) -> int:
    """API keys that open something."""
    return store.queries.num_valid_keys()


def banner(settings: Settings, role: str, url: str | None, store: EventStore) -> str:
    """What a person needs to know of a server that has just come up."""
    environment = store.queries.environment()
    if settings.auth == "off" or (settings.auth == "auto" and not store.queries.has_keys()):
        access = "this machine only, no keys (tinkerbell keys create TENANT makes the first)"
    else:
        access = f"API keys ({num_valid_keys(store)} valid)"
    lines = {
        "url": f"{url}  (API documentation: {url}/schema)" if url else None,
        "role": role,
        "access": access if url else None,
        "database": shown(settings.url) + ("" if settings.durability == "full" else "  (durability relaxed)"),
        "blobs": str(settings.blob_dir),
        "model": environment.model.name if environment else "none yet: no executor has come up",
        "executor": f"{environment.executor}, {'exact' if environment.exact else 'fast'}" if environment else None,
        "log": f"{store.head():,} events",
    }
    return "\n".join(
        ["Tinkerbell is ready.", *(f"  {name:<9} {text}" for name, text in lines.items() if text is not None)]
    )


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """While nothing else takes them, SIGTERM and SIGINT raise Interrupted."""

    def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
        raise Interrupted(number)

    previous = {sign: signal.signal(sign, interrupt) for sign in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for sign, handler in previous.items():
            signal.signal(sign, handler)
