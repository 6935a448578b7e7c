"""Tells streams that the log has grown, and never what is in it: they read that from the log at their own
pace."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tinkerbell.events.kinds import Recorded
from tinkerbell.events.store import EventStore
from tinkerbell.types import SYSTEM_TENANT, TenantId


class Doorbell:
    """One subscription to the log for all streams of this process. Rings coalesce, so a slow stream costs
    nothing."""

    def __init__(self, store: EventStore, read: Callable[..., Awaitable[Any]]) -> None:
        """`read`: as FutureWaiter has it."""
        self._store = store
        self._read = read
        self._bells: dict[TenantId, set[asyncio.Event]] = {}
        self._unsubscribe: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Subscribe; the running loop is the one the bells ring in."""
        self._loop = asyncio.get_running_loop()
        self._unsubscribe = await self._read(SYSTEM_TENANT, self._store.subscribe, self._heard)

    def stop(self) -> None:
        """Unsubscribe and ring every bell a last time."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        self._ring(set(self._bells))

    @contextmanager
    def bell(self, tenant: TenantId) -> Iterator[asyncio.Event]:
        """An event that is set whenever the tenant's log has grown; the listener clears it before it
        reads."""
        bell = asyncio.Event()
        self._bells.setdefault(tenant, set()).add(bell)
        try:
            yield bell
        finally:
            self._bells[tenant].discard(bell)
            if not self._bells[tenant]:
                del self._bells[tenant]

    def _heard(self, events: Sequence[Recorded]) -> None:
        """On the store's tail thread."""
        tenants = {event.tenant for event in events}
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ring, tenants)

    def _ring(self, tenants: set[TenantId]) -> None:
        for tenant in tenants:
            for bell in self._bells.get(tenant, ()):
                bell.set()
