"""One leadership: read what was asked, plan, execute, append, until the lease is lost or the server stops."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import TypeVar

import msgspec

from tinkerbell.config import Settings
from tinkerbell.errors import UNREADABLE, ExecutorDied, TinkerbellError, Unavailable
from tinkerbell.events import kinds
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.leases import Lease
from tinkerbell.events.store import EventStore
from tinkerbell.executors.port import Batch
from tinkerbell.scheduler import batching, chores, results
from tinkerbell.scheduler.batching import Limits, Measure, Plan, Restore
from tinkerbell.scheduler.bodies import Bodies
from tinkerbell.scheduler.checkpoints import Checkpoints
from tinkerbell.scheduler.commits import Commits
from tinkerbell.scheduler.control import Control
from tinkerbell.scheduler.cost import CostModel
from tinkerbell.scheduler.eviction import Eviction
from tinkerbell.scheduler.fair_share import FairShare
from tinkerbell.scheduler.gathering import Gathering
from tinkerbell.scheduler.host import ExecutorHost, wait_for
from tinkerbell.scheduler.intake import Intake
from tinkerbell.scheduler.journal import Journal
from tinkerbell.scheduler.pending import BODY_KINDS, Pending, PendingRequest, Reason
from tinkerbell.scheduler.prices import Prices
from tinkerbell.scheduler.recovery import Recovery
from tinkerbell.scheduler.residency import Residency
from tinkerbell.scheduler.restorer import Restorer
from tinkerbell.scheduler.setbacks import TRY_AGAIN, Setbacks, why
from tinkerbell.scheduler.settlement import Answer, Settlement
from tinkerbell.scheduler.startup import read_backlog
from tinkerbell.scheduler.units import planned, units_of

T = TypeVar("T")

log = logging.getLogger("tinkerbell.scheduler")

LOOK_S = 1.0
"""How often an idle leader looks whether its executor lives; requests wake it at once."""

MOST_DEATHS = 3
"""Executor deaths, or batches that failed unexpectedly, after which a request or an adapter's restore is given up."""

CANCELLED = Reason("user", "cancelled", "The caller cancelled this sample.")


class Leader:
    """The scheduler while it holds the lease. Belongs to one event loop; expects a started host."""

    def __init__(
        self,
        store: EventStore,
        settings: Settings,
        host: ExecutorHost,
        lease: Lease,
        cost: CostModel,
        blamed: Mapping[int, int] | None = None,
    ) -> None:
        """`blamed`: position of a request -> leaderships that ended over it, or over it among others."""
        self._store = store
        self._host = host
        self._lease = lease
        slack_us = float("inf") if settings.fair_slack_ms is None else settings.fair_slack_ms * 1000
        most_us = settings.max_batch_s * 1e6
        self._limits = Limits(settings.batch_tokens, settings.max_batch_adapters, slack_us, most_us)
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._shares = FairShare()
        self._pending = Pending()
        self._gathering = Gathering()
        self._bodies = Bodies(store, settings.batch_tokens)
        self._residency = Residency()
        recovery = Recovery(store, host, settings.batch_tokens)
        self._restorer = Restorer(recovery, self._residency, MOST_DEATHS)
        self._control = Control(recovery, self._residency)
        self._commits = Commits(store, on_failure=self._wake.set)
        self._journal = Journal(self._commits, lease)
        self._intake = Intake(
            *(self._pending, self._shares, self._gathering, self._bodies),
            *(lease, self._commits, self._wake.set, blamed or {}),
        )
        self._setbacks = Setbacks(self._pending, self._journal, self._bodies, self._wake.set)
        every = (settings.checkpoint_every_steps, settings.checkpoint_every_s, settings.max_saving_bytes)
        self._checkpoints = Checkpoints(self._journal, self._residency, *every, on_end=self._wake.set)
        most = (settings.max_resident_adapters, settings.max_sampler_bytes, settings.idle_adapter_s)
        self._eviction = Eviction(self._residency, self._checkpoints, *most)
        self._settlement = Settlement(cost, self._shares, self._residency)
        self._prices = Prices(cost, self._residency)
        self._chores = chores.chores_of(store, lease, settings)
        self._num_batches = 0
        self._in_hand: list[PendingRequest] = []
        """What is being done now."""

    async def run(self) -> None:
        """Lead until `stop`. Raises what ended the leadership otherwise, Fenced before all."""
        loop = asyncio.get_running_loop()

        def hand_over(events: Sequence[Recorded]) -> None:
            loop.call_soon_threadsafe(self._intake.absorb, events)

        # Nothing keeps the backlog: it may be large, and a leadership long.
        head = self._intake.take_over(await asyncio.to_thread(read_backlog, self._store))
        unsubscribe = self._store.subscribe(hand_over, after=head)
        beside = [asyncio.create_task(chore.run()) for chore in self._chores]
        try:
            self._record_environment()
            while not self._stopping.is_set():
                self._wake.clear()
                await self._commits.room()
                await self._gather()
                if not await self._advance():
                    await wait_for(self._wake, LOOK_S)
            await self._commits.settle()
        finally:
            for chore in beside:
                chore.cancel()
            unsubscribe()

    def stop(self) -> None:
        """End after the batch that runs now."""
        self._stopping.set()
        self._wake.set()

    def close(self) -> None:
        """After `run` has ended."""
        self._journal.close()
        self._commits.close()
        chores.end(self._chores)

    def lose(self, exc: Exception) -> None:
        """The lease is gone: write nothing more, and let `run` end."""
        self._commits.fail(exc)

    async def write_checkpoints(self, deadline: float) -> None:
        """On the way out: recovery points for adapters that moved, as far as the time (of the loop's clock) goes."""
        await self._checkpoints.write_all(self._host.link, deadline)
        await self._commits.settle()

    @property
    def blamed(self) -> list[int]:
        """Positions of the requests that it ended over: those whose results the log refused, or else those in hand."""
        return self._commits.refused or [request.position for request in self._in_hand]

    @property
    def num_batches(self) -> int:
        """Batches begun."""
        return self._num_batches

    # ---- what is done next ----

    async def _gather(self) -> None:
        """Wait a moment for who was just served and is likely back at once."""
        while len(self._pending) > 0 and not self._stopping.is_set():
            wait_s = self._gathering.wait_s(time.monotonic())
            if wait_s == 0:
                return
            self._wake.clear()
            await wait_for(self._wake, wait_s)

    async def _advance(self) -> bool:
        """Do the next thing; whether there was one."""
        if not self._host.link.alive:
            log.warning("executor died while nothing ran")
            await self._revive()
            return True
        orphans = self._pending.orphans()
        for tenant, adapter, reason in orphans:
            self._setbacks.fail(self._pending.drop(tenant, adapter), reason)
        # Before anything is planned: a cancelled sample takes nobody's turn and needs no adapter.
        cancelled = self._pending.take_cancelled()
        for request in cancelled:
            self._setbacks.fail([request], CANCELLED, request.batch)
        prices, resident = self._prices, self._residency
        match batching.plan(self._pending, self._shares, prices.price, self._limits, resident, prices.lasts):
            case None:
                return await self._write_checkpoints() or bool(orphans or cancelled)
            case Measure(request):
                self._in_hand = [request]
                await self._read_body(request)
            case Restore(request):
                self._in_hand = [request]
                await self._restore(request)
            case Plan() as plan if self._checkpoints.delay(plan.requests[0]):
                self._settlement.refund(plan)
                self._setbacks.hold_back(plan.requests, asyncio.create_task(self._commits.one_less_apart()))
            case Plan() as plan:
                self._in_hand = plan.requests
                await self._execute(plan)
        self._in_hand = []
        return True

    async def _read_body(self, request: PendingRequest) -> None:
        if request.verdict is not None:
            self._setbacks.give_up(request, request.verdict, request.batch)
            return
        try:
            await self._bodies.get(request)
        except Exception as exc:  # noqa: BLE001 - it is this request's own
            self._setbacks.read(request, exc)
        else:
            self._setbacks.went_on(request)

    async def _restore(self, request: PendingRequest) -> None:
        tenant, adapter = request.tenant, request.adapter
        assert adapter is not None
        await self._commits.settle()
        try:
            reason = await self._call(self._restorer.restore(self._host.link, tenant, adapter))
        except ExecutorDied as exc:
            log.warning("executor died restoring adapter=%s detail=%s", adapter, exc)
            await self._revive()
        except TRY_AGAIN as exc:
            self._commits.check()
            self._setbacks.postpone(request, exc)
        else:
            self._setbacks.went_on(request)
            if reason is not None:
                self._setbacks.fail(self._pending.drop(tenant, adapter), reason)

    async def _execute(self, plan: Plan) -> None:
        """Run one batch and write what came of it."""
        self._num_batches += 1
        batch = f"{self._lease.epoch}.{self._num_batches}"
        costs = [request.cost_us for request in plan.requests]
        try:
            units = await units_of(plan, self._bodies) if plan.lane != "control" else []
        except (*UNREADABLE, *TRY_AGAIN):
            self._withdraw(plan)
            return
        except Exception as exc:  # noqa: BLE001 - one of its requests is why
            await self._lose_batch(plan, batch, exc)
            return
        try:
            self._journal.plan(self._planned(plan, batch))
            if plan.lane == "control":
                answers, charges, busy_us = await self._run_control(plan, batch)
            else:
                told = Batch(id=batch, units=units)
                result = await self._call(self._host.link.run(told, plan.estimated_us / 1e6))
                results.require_finite(result.results)
                busy_us = result.busy_us
                charges = self._settlement.charge(plan, result.results, busy_us, result.own_us)
                answers = self._settlement.answers(plan, batch, result.results)
        except asyncio.CancelledError:
            self._journal.say(kinds.BatchLost(batch=batch, reason="the server stopped in the middle of it"))
            raise
        except Exception as exc:  # noqa: BLE001 - it ends the batch, and in the end the request that brought it about
            self._commits.check()
            for request, cost_us in zip(plan.requests, costs, strict=True):
                request.cost_us = cost_us
            if plan.lane == "control" and isinstance(exc, Unavailable):
                self._put_off(plan, batch, exc)
            else:
                # Also when it lives: nobody knows what a batch that raised did to the adapters.
                await self._lose_batch(plan, batch, exc)
            return
        self._host.worked()
        for answer in answers:
            self._pending.finish(answer.request)
            self._bodies.forget(answer.request)
        ran = kinds.BatchRan(batch=batch, busy_us=busy_us, charges=charges)
        if (writing := self._journal.ran(ran, answers)) is not None:
            self._setbacks.hold_back([answer.request for answer in answers], writing)
        log.debug(
            "batch ran batch=%s lane=%s units=%d answers=%d busy_us=%d estimated_us=%d",
            *(batch, plan.lane, len(plan.works), len(answers), busy_us, plan.estimated_us),
        )
        for request in plan.requests:
            self._residency.use(request.adapter)
        if plan.lane != "control":
            self._served(plan, busy_us)
        await self._write_checkpoints()

    def _planned(self, plan: Plan, batch: str) -> kinds.BatchPlanned:
        assert self._host.environment is not None
        return kinds.BatchPlanned(
            batch=batch,
            lane=plan.lane,
            environment=self._host.environment.digest,
            units=[planned(work) for work in plan.works],
            estimated_us=plan.estimated_us,
        )

    def _served(self, plan: Plan, busy_us: int) -> None:
        adapters = {(request.tenant, request.adapter) for request in plan.requests}
        idle = [adapter for tenant, adapter in adapters if adapter and self._pending.queue(tenant, adapter) is None]
        self._gathering.served(idle, busy_us / 1e6, time.monotonic(), more=len(self._pending) > 0)

    async def _write_checkpoints(self) -> bool:
        """One that is due, or of an adapter that has to leave the executor; whether there was something to do."""
        try:
            wrote = await self._checkpoints.write_due(self._host.link)
            return wrote or await self._eviction.make_room(self._host.link, self._pending)
        except ExecutorDied as exc:
            log.warning("executor died taking a snapshot detail=%s", exc)
            await self._revive()
            return True

    async def _run_control(self, plan: Plan, batch: str) -> tuple[list[Answer], list[tuple[int, int]], int]:
        (work,) = plan.works
        request, event = work.request, work.request.event
        if isinstance(event, kinds.AddLoraRequested | kinds.LoadRequested) and event.checkpoint:
            # It may be one that was saved just before.
            await self._commits.settle()
        done = await self._call(self._control.run(self._host.link, request))
        charges = self._settlement.charge(plan, [None], done.busy_us)
        if done.event is not None:
            completed = msgspec.structs.replace(done.event, batch=batch, cost_us=request.cost_us)
            answer = self._settlement.recordable(Answer(request, completed, blobs=done.blobs), batch)
        else:
            assert done.error is not None
            failure = results.failed(request, done.error.category, done.error.slug, done.error.detail, batch)
            answer = Answer(request, failure)
        self._note(request, answer.event)
        return [answer], charges, done.busy_us

    def _note(self, request: PendingRequest, event: kinds.AnyResult) -> None:
        """Which adapters can be used after a control request."""
        assert request.adapter is not None
        match event:
            case kinds.AddLoraFailed():
                self._setbacks.never_made(request, Reason(event.category, event.code, event.message))
            case kinds.RemoveLoraCompleted():
                reason = Reason("user", "not-found", f"adapter {request.adapter} was removed")
                self._pending.end(request.tenant, request.adapter, reason)
                self._gathering.forget(request.adapter)
            case kinds.LoadCompleted():
                self._restorer.replaced(request.adapter)
            case _:
                pass

    def _put_off(self, plan: Plan, batch: str, exc: Unavailable) -> None:
        """What a control request needs cannot be read now: nothing has happened, and it is tried again."""
        self._settlement.refund(plan)
        self._journal.say(kinds.BatchLost(batch=batch, reason=exc.detail))
        self._setbacks.postpone(plan.requests[0], exc)

    async def _lose_batch(self, plan: Plan, batch: str, exc: Exception) -> None:
        """The executor died in it, or nobody knows what happened: everything in it runs again, one request at a time,
        until the cause shows."""
        reason = exc.detail if isinstance(exc, TinkerbellError) else why(exc).message
        positions = [request.position for request in plan.requests]
        log.warning("batch lost batch=%s requests=%s detail=%s", batch, positions, reason)
        self._settlement.refund(plan)
        self._journal.say(kinds.BatchLost(batch=batch, reason=reason))
        died = isinstance(exc, ExecutorDied)
        for request in plan.requests:
            request.deaths += 1
            if request.deaths >= MOST_DEATHS:
                what = "the executor died" if died else f"a batch failed ({reason})"
                message = f"{what} {request.deaths} times while it ran this request"
                log.error("poison request=%d tenant=%s detail=%s", request.position, request.tenant, message)
                self._setbacks.give_up(request, Reason("server", "poison", message), batch)
        await self._revive()

    async def _revive(self) -> None:
        self._pending.rewind()
        self._residency.clear()
        self._restorer.new_executor()
        await self._commits.settle()
        if await self._host.restart(self._stopping) is not None:
            self._record_environment()

    def _withdraw(self, plan: Plan) -> None:
        """A body cannot be read any more: all are read again, and the one that cannot be fails in its turn."""
        self._settlement.refund(plan)
        for request in plan.requests:
            if request.kind in BODY_KINDS:
                request.chunks.clear()

    def _record_environment(self) -> None:
        assert self._host.environment is not None
        self._journal.say(self._host.environment)

    async def _call(self, call: Awaitable[T]) -> T:
        """Wait for the executor. What it says does not count once a write was refused."""
        try:
            return await call
        finally:
            self._commits.check()
