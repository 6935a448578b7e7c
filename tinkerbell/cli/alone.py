"""For commands that change what is stored: no server may run on the log meanwhile."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tinkerbell.errors import Conflict, TinkerbellError

if TYPE_CHECKING:
    from tinkerbell.events.leases import Lease
    from tinkerbell.events.store import EventStore

TTL_S = 30.0
SQLITE_TTL_S = 24 * 3600.0
"""VACUUM holds the file for as long as it takes, and nobody can renew meanwhile. A killed command keeps no lease for
all that: servers on SQLite are on its machine, and see that it has ended."""

log = logging.getLogger("tinkerbell.cli")


@contextmanager
def alone(store: "EventStore", what: str) -> Iterator["Lease"]:
    """The scheduler's lease, which every server needs, kept until the end. Raises Conflict while a server has it."""
    from tinkerbell.events.holders import name_this_process
    from tinkerbell.scheduler.service import RESOURCE

    ttl_s = SQLITE_TTL_S if store.dialect == "sqlite" else TTL_S
    lease = store.acquire_lease(RESOURCE, name_this_process(what), ttl_s)
    if lease is None:
        raise Conflict(
            "a server is running on this log: stop it first, all of its processes. One that was killed on another"
            " machine keeps its lease for a few seconds more (`lease_ttl_s`)"
        )
    done = threading.Event()

    def renew() -> None:
        while not done.wait(TTL_S / 3):
            try:
                store.renew_lease(lease, ttl_s)
            except (TinkerbellError, OSError) as exc:
                log.warning("the lease was not renewed: %s", exc)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        done.set()
        thread.join()
        store.release_lease(lease)
