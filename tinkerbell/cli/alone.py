"""For commands that change what is stored: no server may run on the log meanwhile."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tinkerbell.errors import Conflict

if TYPE_CHECKING:
    from tinkerbell.events.leases import Lease
    from tinkerbell.events.store import EventStore

TTL_S = 30.0


@contextmanager
def alone(store: "EventStore", what: str) -> Iterator["Lease"]:
    """The scheduler's lease, which every server needs, kept until the end. Raises Conflict while a server has it."""
    from tinkerbell.events.holders import name_this_process
    from tinkerbell.scheduler.service import RESOURCE

    lease = store.acquire_lease(RESOURCE, name_this_process(what), TTL_S)
    if lease is None:
        raise Conflict(
            "a server is running on this log: stop it first, all of its processes. One that was killed on another"
            " machine keeps its lease for a few seconds more (`lease_ttl_s`)"
        )
    done = threading.Event()

    def renew() -> None:
        while not done.wait(TTL_S / 3):
            store.renew_lease(lease, TTL_S)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        done.set()
        thread.join()
        store.release_lease(lease)
