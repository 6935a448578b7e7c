"""What every route shares: the store, the gate, the waiter, the feed; made with the app, closed with
it."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import msgspec

from tinkerbell.api.auth import Gate
from tinkerbell.api.decoders import Decoders
from tinkerbell.api.feed import Feed
from tinkerbell.api.shares import Shares
from tinkerbell.api.threads import Threads
from tinkerbell.config import Settings
from tinkerbell.errors import Unavailable
from tinkerbell.events.futures import FutureWaiter
from tinkerbell.events.kinds import EnvironmentRecorded, Recorded, TenantConfigured
from tinkerbell.events.rows import TenantRow
from tinkerbell.events.store import EventStore
from tinkerbell.types import SYSTEM_TENANT, ModelInfo, TenantId

P = ParamSpec("P")
T = TypeVar("T")

RETRY_SOON_S = 1.0
"""Advice while a server is starting."""


class Held(msgspec.Struct, frozen=True):
    """What requests take of their tenant's limits."""

    requests: int = 0
    tokens: int = 0


class InFlight:
    """What is admitted but not yet committed, by tenant: concurrent posts must not all see the same free
    place."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[TenantId, Held] = {}

    def hold(self, tenant: TenantId, more: Held) -> Held:
        """Count a request; what was held before it."""
        with self._lock:
            before = self._held.get(tenant, Held())
            self._held[tenant] = Held(before.requests + more.requests, before.tokens + more.tokens)
            return before

    def release(self, tenant: TenantId, less: Held) -> None:
        """It is committed, or refused."""
        with self._lock:
            held = self._held.pop(tenant)
            if held != less:
                self._held[tenant] = Held(held.requests - less.requests, held.tokens - less.tokens)


class Context:
    """One per app. All asyncio parts belong to the loop that runs the app's lifespan."""

    def __init__(
        self,
        settings: Settings,
        store: EventStore,
        scheduler_failed: Callable[[], Exception | None] | None,
        executor_away: Callable[[], bool] | None = None,
    ) -> None:
        self.settings = settings
        self.store = store
        self.threads = Threads(settings.limits.max_waiting_reads)
        self.decoders = Decoders()
        self.shares = Shares(settings.limits)
        self.gate = Gate(settings, store.queries, self.threads.gate)
        self.waiter = FutureWaiter(store, self.read)
        self.feed = Feed(store, self.read)
        self.in_flight = InFlight()
        self.stopping = asyncio.Event()
        """Set when the server is about to end: streams and long polls end by themselves."""
        self._scheduler_failed = scheduler_failed
        self._executor_away = executor_away
        self._model: ModelInfo | None = None
        self._tenants: dict[TenantId, TenantRow] = {}
        self._learning = threading.Lock()
        self._unsubscribe: Callable[[], None] | None = None

    async def start(self) -> None:
        """Subscribe to the log."""
        self._unsubscribe = await self.read(SYSTEM_TENANT, self.store.subscribe, self._learn)
        await self.waiter.start()
        await self.feed.start()

    async def stop(self) -> None:
        """Wake everybody who waits; they answer with what there is. May be called twice."""
        if self.stopping.is_set():
            return
        self.stopping.set()
        if self._unsubscribe is not None:
            self._unsubscribe()
        self.feed.stop()
        await self.waiter.stop()

    async def read(self, tenant: TenantId, question: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The answer to a question, which may block; asked in one of the tenant's threads. Raises what it raises,
        TooManyRequests."""
        return await self.threads.reads.run(tenant, question, *args, **kwargs)

    def failure(self) -> Exception | None:
        """Why this process's scheduler ended, or its event store cannot go on, if that is so."""
        failed = self._scheduler_failed() if self._scheduler_failed is not None else None
        return failed or self.store.failure()

    def executor_away(self) -> bool:
        """Whether this process's executor has ended and is not there again yet."""
        return self._executor_away is not None and self._executor_away()

    def model(self) -> ModelInfo:
        """The served model. Raises Unavailable until an executor has come up. Reads the database the first time."""
        model = self._model
        if model is None:
            environment = self.store.queries.environment()
            if environment is None:
                raise Unavailable("No executor has come up yet; try again shortly.", retry_after_s=RETRY_SOON_S)
            model = environment.model
            if self._unsubscribe is not None:
                with self._learning:
                    # What the log said meanwhile is newer than what was read.
                    model = self._model = self._model or model
        return model

    def tenant(self, tenant: TenantId) -> TenantRow:
        """Share and limits of a tenant. Reads the database the first time."""
        known = self._tenants.get(tenant)
        if known is None:
            known = self.store.queries.tenant(tenant)
            if self._unsubscribe is not None:
                known = self._tenants.setdefault(tenant, known)
        return known

    def _learn(self, events: Sequence[Recorded]) -> None:
        """On the store's tail thread."""
        for recorded in events:
            match recorded.event:
                case EnvironmentRecorded(model=model):
                    with self._learning:
                        self._model = model
                case TenantConfigured() as configured:
                    limits = {name: getattr(configured, name) for name in configured.__struct_fields__}
                    self._tenants[recorded.tenant] = TenantRow(tenant=recorded.tenant, **limits)
                case _:
                    pass
