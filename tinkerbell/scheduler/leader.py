"""One leadership: read what was asked, plan, execute, append, until the lease is lost or the server stops."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterable, Sequence
from typing import TypeVar

import msgspec

from tinkerbell.config import Settings
from tinkerbell.errors import Corrupt, ExecutorDied, Fenced, ServerError, TinkerbellError
from tinkerbell.events import kinds
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.leases import Lease
from tinkerbell.events.store import EventStore
from tinkerbell.executors.port import Batch
from tinkerbell.scheduler import batching, results
from tinkerbell.scheduler.batching import Limits, Measure, Plan, Restore
from tinkerbell.scheduler.bodies import Bodies
from tinkerbell.scheduler.checkpoints import Checkpoints
from tinkerbell.scheduler.chores import chores_of
from tinkerbell.scheduler.commits import Commits
from tinkerbell.scheduler.control import Control
from tinkerbell.scheduler.cost import CostModel, features
from tinkerbell.scheduler.eviction import Eviction
from tinkerbell.scheduler.fair_share import FairShare
from tinkerbell.scheduler.gathering import Gathering
from tinkerbell.scheduler.host import ExecutorHost, wait_for
from tinkerbell.scheduler.journal import Journal
from tinkerbell.scheduler.pending import BODY_KINDS, Pending, PendingRequest, Reason
from tinkerbell.scheduler.recovery import Recovery
from tinkerbell.scheduler.residency import Residency
from tinkerbell.scheduler.restorer import Restorer
from tinkerbell.scheduler.settlement import Answer, Settlement
from tinkerbell.scheduler.startup import Backlog, read_backlog
from tinkerbell.scheduler.units import planned, units_of

T = TypeVar("T")

log = logging.getLogger("tinkerbell.scheduler")

LOOK_S = 1.0
"""How often an idle leader looks whether its executor lives; requests wake it at once."""

MOST_DEATHS = 3
"""Executor deaths after which a request, or an adapter's restore, is given up."""

CANCELLED = Reason("user", "cancelled", "The caller cancelled this sample.")


class Leader:
    """The scheduler while it holds the lease. Belongs to one event loop; expects a started host."""

    def __init__(
        self, store: EventStore, settings: Settings, host: ExecutorHost, lease: Lease, cost: CostModel
    ) -> None:
        self._store = store
        self._host = host
        self._lease = lease
        self._cost = cost
        slack_us = float("inf") if settings.fair_slack_ms is None else settings.fair_slack_ms * 1000
        self._limits = Limits(settings.batch_tokens, settings.max_batch_adapters, slack_us)
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
        every = (settings.checkpoint_every_steps, settings.checkpoint_every_s, settings.max_saving_bytes)
        self._checkpoints = Checkpoints(self._journal, self._residency, *every, on_end=self._wake.set)
        self._eviction = Eviction(
            self._residency, self._checkpoints, settings.max_resident_adapters, settings.idle_adapter_s
        )
        self._settlement = Settlement(cost, self._shares, self._residency)
        self._chores = chores_of(store, lease, settings)
        self._num_batches = 0

    async def run(self) -> None:
        """Lead until `stop`. Raises what ended the leadership otherwise, Fenced before all."""
        loop = asyncio.get_running_loop()

        def hand_over(events: Sequence[Recorded]) -> None:
            loop.call_soon_threadsafe(self._absorb, events)

        # Nothing keeps the backlog: it may be large, and a leadership long.
        head = self._take_over(await asyncio.to_thread(read_backlog, self._store))
        unsubscribe = self._store.subscribe(hand_over, after=head)
        chores = [asyncio.create_task(chore.run()) for chore in self._chores]
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
            for chore in chores:
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

    def lose(self, exc: Exception) -> None:
        """The lease is gone: write nothing more, and let `run` end."""
        self._commits.fail(exc)

    async def write_checkpoints(self, deadline: float) -> None:
        """On the way out: recovery points for adapters that moved, as far as the time (of the loop's clock) goes."""
        await self._checkpoints.write_all(self._host.link, deadline)
        await self._commits.settle()

    # ---- what was asked ----

    def _take_over(self, backlog: Backlog) -> int:
        """The position up to which it is known what waits."""
        self._pending = Pending(after=backlog.head)
        for tenant, weight in backlog.weights.items():
            self._shares.set_weight(tenant, weight)
        for recorded in backlog.requests:
            self._measure(self._pending.add(recorded), recorded)
        for (tenant, adapter), reason in backlog.ended.items():
            self._pending.end(tenant, adapter, reason)
        for request in self._pending:
            request.cost_us, request.batch = backlog.ran.get(request.position, (0, None))
        for position in backlog.cancelled:
            self._pending.cancel(position)
        log.info("leading epoch=%d position=%d pending=%d", self._lease.epoch, backlog.head, len(self._pending))
        return backlog.head

    def _absorb(self, events: Sequence[Recorded]) -> None:
        try:
            self._take_in(events)
        except Exception as exc:  # noqa: BLE001 - a request that is not taken in would wait for ever
            self._commits.fail(exc)

    def _take_in(self, events: Sequence[Recorded]) -> None:
        for recorded in events:
            event = recorded.event
            if isinstance(event, kinds.LeaseGranted) and self._is_replaced_by(event):
                # What follows is another leader's work. It may answer what runs here now, and must not take it out of
                # the queues under it.
                self.lose(Fenced(f"{event.holder} leads by now; its epoch is {event.epoch}"))
            if self._commits.failed:
                return
            if isinstance(event, kinds.TenantConfigured):
                self._shares.set_weight(recorded.tenant, event.weight)
            request = self._pending.absorb(recorded)
            if isinstance(event, kinds.SampleCancelled):
                self._wake.set()
            if request is not None:
                self._measure(request, recorded)
                if request.adapter is not None:
                    self._gathering.sent(request.adapter, time.monotonic())
                self._wake.set()

    def _is_replaced_by(self, granted: kinds.LeaseGranted) -> bool:
        return granted.resource == self._lease.resource and granted.epoch > self._lease.epoch

    def _measure(self, request: PendingRequest, recorded: Recorded) -> None:
        try:
            self._bodies.take_inline(request, recorded)
        except Corrupt as exc:
            # Left unmeasured: it fails when its turn comes, in order.
            log.error("body unreadable request=%d detail=%s", recorded.position, exc)

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
            self._fail(self._pending.drop(tenant, adapter), reason)
        # Before anything is planned: a cancelled sample takes nobody's turn and needs no adapter.
        cancelled = self._pending.take_cancelled()
        for request in cancelled:
            self._fail([request], CANCELLED, request.batch)
        match batching.plan(self._pending, self._shares, self._price, self._limits, self._residency):
            case None:
                return await self._write_checkpoints() or bool(orphans or cancelled)
            case Measure(request):
                await self._read_body(request)
            case Restore(request):
                await self._restore(request)
            case Plan() as plan if self._checkpoints.delay(plan.requests[0]):
                self._settlement.refund(plan)
                self._hold_back(plan.requests, asyncio.create_task(self._commits.one_less_apart()))
            case Plan() as plan:
                await self._execute(plan)
        return True

    def _price(self, request: PendingRequest, chunk: int) -> int:
        return self._cost.estimate_us(features(request, chunk, self._residency.num_parameters(request.adapter)))

    async def _read_body(self, request: PendingRequest) -> None:
        try:
            await self._bodies.get(request)
        except Corrupt as exc:
            self._pending.finish(request)
            self._fail([request], Reason("server", exc.slug, exc.detail))

    async def _restore(self, request: PendingRequest) -> None:
        tenant, adapter = request.tenant, request.adapter
        assert adapter is not None
        await self._commits.settle()
        try:
            reason = await self._call(self._restorer.restore(self._host.link, tenant, adapter))
        except ExecutorDied as exc:
            log.warning("executor died restoring adapter=%s detail=%s", adapter, exc)
            await self._revive()
            return
        if reason is not None:
            self._fail(self._pending.drop(tenant, adapter), reason)

    async def _execute(self, plan: Plan) -> None:
        """Run one batch and write what came of it."""
        self._num_batches += 1
        batch = f"{self._lease.epoch}.{self._num_batches}"
        try:
            units = await units_of(plan, self._bodies) if plan.lane != "control" else []
        except Corrupt:
            self._withdraw(plan)
            return
        assert self._host.environment is not None
        self._journal.plan(
            kinds.BatchPlanned(
                batch=batch,
                lane=plan.lane,
                environment=self._host.environment.digest,
                units=[planned(work) for work in plan.works],
                estimated_us=plan.estimated_us,
            )
        )
        try:
            if plan.lane == "control":
                answers, charges, busy_us = await self._run_control(plan, batch)
            else:
                told = Batch(id=batch, units=units)
                result = await self._call(self._host.link.run(told, plan.estimated_us / 1e6))
                results.require_finite(result.results)
                busy_us = result.busy_us
                charges = self._settlement.charge(plan, result.results, busy_us)
                answers = self._settlement.answers(plan, batch, result.results)
        except asyncio.CancelledError:
            self._journal.say(kinds.BatchLost(batch=batch, reason="the server stopped in the middle of it"))
            raise
        except ServerError as exc:
            # Also when it lives: nobody knows what a batch that raised did to the adapters.
            self._commits.check()
            await self._lose_batch(plan, batch, exc)
            return
        self._host.worked()
        for answer in answers:
            self._pending.finish(answer.request)
            self._bodies.forget(answer.request)
        ran = kinds.BatchRan(batch=batch, busy_us=busy_us, charges=charges)
        if (writing := self._journal.ran(ran, answers)) is not None:
            self._hold_back([answer.request for answer in answers], writing)
        log.debug(
            "batch ran batch=%s lane=%s units=%d answers=%d busy_us=%d estimated_us=%d",
            *(batch, plan.lane, len(plan.works), len(answers), busy_us, plan.estimated_us),
        )
        for request in plan.requests:
            self._residency.use(request.adapter)
        if plan.lane != "control":
            self._served(plan, busy_us)
        await self._write_checkpoints()

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
        self._note(request, done.error)
        if done.event is None:
            assert done.error is not None
            failure = results.failed(request, done.error.category, done.error.slug, done.error.detail, batch)
            return [Answer(request, failure)], charges, done.busy_us
        completed = msgspec.structs.replace(done.event, batch=batch, cost_us=request.cost_us)
        return [Answer(request, completed, blobs=done.blobs)], charges, done.busy_us

    def _note(self, request: PendingRequest, error: TinkerbellError | None) -> None:
        """Which adapters can be used after a control request."""
        assert request.adapter is not None
        if request.kind == "add_lora" and error is not None:
            reason = Reason(error.category, "adapter-failed", f"add_lora failed: {error.detail}")
            self._pending.end(request.tenant, request.adapter, reason)
        elif request.kind == "remove_lora" and error is None:
            reason = Reason("user", "not-found", f"adapter {request.adapter} was removed")
            self._pending.end(request.tenant, request.adapter, reason)
            self._gathering.forget(request.adapter)
        elif request.kind == "load" and error is None:
            self._restorer.replaced(request.adapter)

    async def _lose_batch(self, plan: Plan, batch: str, exc: ServerError) -> None:
        """The executor died in it: everything in it runs again, one request at a time, until the cause shows."""
        positions = [request.position for request in plan.requests]
        log.warning("batch lost batch=%s requests=%s detail=%s", batch, positions, exc)
        self._settlement.refund(plan)
        self._journal.say(kinds.BatchLost(batch=batch, reason=exc.detail))
        for request in plan.requests:
            request.deaths += 1
            if request.deaths >= MOST_DEATHS:
                self._pending.finish(request)
                message = f"the executor died {request.deaths} times while it ran this request"
                log.error("poison request=%d tenant=%s detail=%s", request.position, request.tenant, message)
                self._fail([request], Reason("server", "poison", message), batch)
                if request.lane == "control":
                    self._note(request, ExecutorDied(message))
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

    def _fail(self, requests: Sequence[PendingRequest], reason: Reason, batch: str | None = None) -> None:
        """Answer requests that were taken from their queues already."""
        self._journal.fail(requests, reason, batch)
        for request in requests:
            self._bodies.forget(request)

    def _hold_back(self, requests: Iterable[PendingRequest], until: "asyncio.Task[None]") -> None:
        """The adapters' later results may not overtake those being written."""
        held = {(request.tenant, request.adapter) for request in requests if request.adapter is not None}
        for tenant, adapter in held:
            self._pending.block(tenant, adapter)

        def go_on(_task: object) -> None:
            for tenant, adapter in held:
                self._pending.unblock(tenant, adapter)
            self._wake.set()

        until.add_done_callback(go_on)

    def _record_environment(self) -> None:
        assert self._host.environment is not None
        self._journal.say(self._host.environment)

    async def _call(self, call: Awaitable[T]) -> T:
        """Wait for the executor. What it says does not count once a write was refused."""
        try:
            return await call
        finally:
            self._commits.check()
