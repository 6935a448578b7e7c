"""Bringing an adapter back into a new executor: newest saved state, then its committed tail again, step by
step compared with what the log says it came to: bit for bit where both environments promise that and are the same."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tinkerbell.errors import Corrupt, ExecutorDied, NotFound, ServerError, TinkerbellError, Unavailable
from tinkerbell.events import kinds
from tinkerbell.events.base_models import base_model_of, require_same
from tinkerbell.events.kinds import EnvironmentRecorded, Recorded
from tinkerbell.events.rows import CheckpointRow
from tinkerbell.events.store import EventStore
from tinkerbell.executors.link import ExecutorLink
from tinkerbell.executors.port import (
    AdapterReport,
    AdapterState,
    Batch,
    OptimStepDone,
    Unit,
    UnitResult,
)
from tinkerbell.scheduler.environments import differences, tolerance_of
from tinkerbell.scheduler.host import ExecutorHost
from tinkerbell.scheduler.residency import Resident
from tinkerbell.scheduler.tail import Committed, committed_tail
from tinkerbell.scheduler.units import units_again
from tinkerbell.types import AdapterId, CheckpointId, LoraConfig, TenantId

log = logging.getLogger("tinkerbell.scheduler")

_PAGE = 1000
_PAGE_BACK = 64

ORIGINS = (kinds.AddLoraCompleted, kinds.LoadCompleted, kinds.SaveCompleted, kinds.CheckpointWritten)
"""Events from which an adapter's weights and moments can be had without what came before; of the saved ones only those
with `use` = state."""

BOUNDARIES = (kinds.AddLoraCompleted, kinds.LoadCompleted, kinds.OptimStepCompleted)
"""Events after which no gradient is accumulated."""

_MARKS = [kinds.type_of(cls) for cls in (*ORIGINS, kinds.OptimStepCompleted)]
_TAIL = [
    "forward_backward.requested",
    "forward_backward.completed",
    "optim_step.requested",
    "optim_step.completed",
    "optim_step.failed",
]


class StateLost(ServerError):
    """The adapter's state cannot be brought back as it was."""

    slug = "state-lost"


@dataclass(frozen=True, slots=True)
class Marks:
    """Where to begin."""

    origin: Recorded
    boundary: int
    """Position of the last request that changed weights or moments, at or before the origin. Gradients of
    later requests are not in the origin: a `save` may stand between a forward_backward and its optim_step."""


def last_marks(events: Sequence[Recorded]) -> Marks | None:
    """From an adapter's newest ORIGINS and BOUNDARIES in log order; None if there are not both.

    The `causation` of each is the last request whose effect it holds.
    """
    origin: Recorded | None = None
    for recorded in events:
        if _is_origin(recorded.event) and (origin is None or covers(recorded) >= covers(origin)):
            origin = recorded
    if origin is None:
        return None
    boundaries = [
        covers(recorded)
        for recorded in events
        if isinstance(recorded.event, BOUNDARIES) and covers(recorded) <= covers(origin)
    ]
    return Marks(origin, max(boundaries)) if boundaries else None


def _is_origin(event: kinds.Event) -> bool:
    return isinstance(event, ORIGINS) and not (isinstance(event, kinds.SaveCompleted) and event.use != "state")


def covers(recorded: Recorded) -> int:
    """Position of the last request whose effect the state named by this event has."""
    assert recorded.causation is not None
    return recorded.causation


def find_marks(store: EventStore, adapter: AdapterId) -> Marks:
    """Where an adapter's restoring begins. Reads the log backwards, no further than needed: a run may have any number
    of steps. Raises StateLost."""
    events: list[Recorded] = []
    while page := store.read_back(
        before=events[0].position if events else None, limit=_PAGE_BACK, adapter=adapter, types=_MARKS
    ):
        events = page[::-1] + events
        marks = last_marks(events)
        _require_readable(each for each in events if _may_bound(each) and (marks is None or _is_after(each, marks)))
        # An event comes after the request it is about: none before the boundary can be newer than these.
        if marks is not None and events[0].position <= marks.boundary:
            return marks
    marks = last_marks(events)
    if marks is None:
        raise StateLost("the adapter was never made")
    return marks


def _require_readable(events: Iterable[Recorded]) -> None:
    """Raise StateLost for what cannot be read: it may say what the adapter came to."""
    for recorded in events:
        if isinstance(recorded.event, kinds.Unreadable):
            raise StateLost(f"event {recorded.position} of the adapter cannot be read: {recorded.event.why}")


def _may_bound(recorded: Recorded) -> bool:
    """Whether it may be one of BOUNDARIES: a saved state that cannot be read is only one origin less."""
    return kinds.type_of(recorded.event) not in ("save.completed", "checkpoint.written")


def _is_after(recorded: Recorded, marks: Marks) -> bool:
    return recorded.position > marks.boundary


class Recovery:
    """Restores adapters from the log. The log must be settled: no commit of the adapter's in flight."""

    def __init__(self, store: EventStore, host: ExecutorHost, batch_tokens: int) -> None:
        self._store = store
        self._host = host
        self._batch_tokens = batch_tokens

    async def restore(self, link: ExecutorLink, tenant: TenantId, adapter: AdapterId) -> Resident:
        """The adapter in the executor as the log left it.

        Raises OtherBaseModel, StateLost where it does not come out the same, ExecutorDied.
        """
        await self.require_base(tenant, adapter, f"adapter {adapter}")
        try:
            marks = await asyncio.to_thread(find_marks, self._store, adapter)
            report = await self._begin(link, tenant, adapter, marks.origin)
            expected = marks.origin.event.state_digest  # type: ignore[union-attr]
            if report.state_digest != expected:
                raise StateLost(
                    f"the state of event {marks.origin.position} came back with digest {report.state_digest}, "
                    f"recorded {expected}"
                )
            boundary = await asyncio.to_thread(self._store.get, marks.boundary)
            assert boundary is not None and boundary.seq is not None
            resident = Resident(
                tenant=tenant,
                adapter=adapter,
                num_parameters=report.num_parameters,
                step=report.step,
                state_digest=report.state_digest,
                boundary_seq=boundary.seq,
                boundary_position=marks.boundary,
            )
            tail = await asyncio.to_thread(self._tail, adapter, marks.boundary)
            await self._execute(link, resident, tail)
        except (StateLost, ExecutorDied, Unavailable):
            raise
        except TinkerbellError as exc:
            raise StateLost(exc.detail) from exc
        return resident

    async def _begin(self, link: ExecutorLink, tenant: TenantId, adapter: AdapterId, origin: Recorded) -> AdapterReport:
        event = origin.event
        if isinstance(event, kinds.SaveCompleted | kinds.CheckpointWritten):
            state = await asyncio.to_thread(self._state, event.lora, event.step, event.state_digest, origin.blobs)
            return (await link.load(adapter, state, True)).value
        request = await asyncio.to_thread(self._store.get, covers(origin))
        assert request is not None
        asked = request.event
        assert isinstance(asked, kinds.AddLoraRequested | kinds.LoadRequested)
        if asked.checkpoint is None:
            assert isinstance(asked, kinds.AddLoraRequested)
            return (await link.create(adapter, asked.lora, asked.seed)).value
        _, state = await self.checkpoint(tenant, asked.checkpoint)
        return (await link.load(adapter, state, asked.with_optimizer)).value

    async def checkpoint(self, tenant: TenantId, checkpoint: CheckpointId) -> tuple[CheckpointRow, AdapterState]:
        """A tenant's own checkpoint. Raises NotFound (also for another tenant's), Corrupt."""
        row = await asyncio.to_thread(self._store.queries.checkpoint, tenant, checkpoint)
        if row is None:
            raise NotFound(f"no checkpoint {checkpoint}")
        state = await asyncio.to_thread(self._state, row.lora, row.step, row.state_digest, row.blobs)
        return row, state

    async def require_base(self, tenant: TenantId, adapter: AdapterId, what: str) -> None:
        """Raise OtherBaseModel where the adapter (`what` is that, or was saved of it) belongs to another model."""
        assert self._host.environment is not None
        trained_on = await asyncio.to_thread(self._store.queries.base_model, tenant, adapter)
        if trained_on is not None:
            require_same(what, trained_on, base_model_of(self._host.environment))

    async def lora(self, adapter: AdapterId) -> LoraConfig:
        """Shape of an adapter, as it was asked for."""
        made = await asyncio.to_thread(self._store.read, 0, limit=1, adapter=adapter, types=["add_lora.requested"])
        if not made or not isinstance(event := made[0].event, kinds.AddLoraRequested):
            raise Corrupt(f"the log does not say what shape the adapter {adapter} has")
        return event.lora

    async def _execute(self, link: ExecutorLink, resident: Resident, tail: list[Committed]) -> None:
        units: list[Unit] = []
        batch: list[Committed] = []
        tokens = 0
        for number, committed in enumerate(tail):
            recorded = committed.request
            units += await asyncio.to_thread(self._units, recorded)
            batch.append(committed)
            tokens += getattr(recorded.event, "num_tokens", 0)
            stepped = isinstance(recorded.event, kinds.OptimStepRequested)
            if not (stepped or tokens >= self._batch_tokens or number == len(tail) - 1):
                continue
            results = (await link.run(Batch(id=f"restore.{resident.adapter}.{number}", units=units))).results
            for each in batch:
                found = [outcome for outcome in results if outcome.request == each.request.position]
                if (difference := each.difference(found)) is not None:
                    await asyncio.to_thread(self._weigh, each, found, difference, resident.step)
            done = results[-1]
            if isinstance(done, OptimStepDone):
                assert recorded.seq is not None
                resident.stepped(recorded.seq, recorded.position, done.step, done.state_digest)
            units, batch, tokens = [], [], 0

    def _weigh(self, committed: Committed, found: list[UnitResult], difference: str, step: int) -> None:
        """A request came to other bits than recorded. Raises StateLost unless nobody promised them, or nothing rests on
        them; then the numbers must be close.

        In another environment an accumulated gradient is computed anew: nothing acknowledged has been built on its
        bits. A step that was taken is not taken again otherwise, or the log would name weights that nobody has.
        """
        now = self._host.environment
        assert now is not None
        then = self._environment_of(committed)
        changes = differences(then, now)
        said = f"{difference} (after step {step})"
        if changes:
            named = "; ".join(f"{each.fact} was {each.recorded}, is {each.found}" for each in changes)
            said += f", in another environment: {named}"
        if then.exact and not changes:
            raise StateLost(said)
        if then.exact and isinstance(committed.request.event, kinds.OptimStepRequested):
            raise StateLost(f"{said}. Start the server as it was, or load a checkpoint")
        if (deviation := committed.deviation(found, tolerance_of(now.facts.get("dtype")), step)) is not None:
            raise StateLost(f"{deviation}: {said}" if deviation not in said else said)
        log.warning("executed again within tolerance adapter=%s detail=%s", committed.request.adapter, said)

    def _environment_of(self, committed: Committed) -> EnvironmentRecorded:
        """In which the log has it. Raises Corrupt."""
        batch = committed.result.batch
        found = None if batch is None else self._store.queries.environment_of(batch)
        if found is None:
            raise Corrupt(
                f"the log does not say in which environment the request at position {committed.request.position} ran"
            )
        return found

    def _units(self, recorded: Recorded) -> list[Unit]:
        return units_again(recorded, self._store.body(recorded))

    def _tail(self, adapter: AdapterId, after: int) -> list[Committed]:
        return committed_tail(self._read(adapter, after, _TAIL))

    def _read(self, adapter: AdapterId, after: int, types: list[str]) -> list[Recorded]:
        events: list[Recorded] = []
        while page := self._store.read(after, limit=_PAGE, adapter=adapter, types=types):
            _require_readable(each for each in page if kinds.is_result(each.event))
            events.extend(page)
            after = page[-1].position
        return events

    def _state(self, lora: LoraConfig, step: int, digest: str, blobs: dict[str, str]) -> AdapterState:
        return adapter_state(lora, step, digest, blobs, self._store.blob)


def adapter_state(
    lora: LoraConfig, step: int, digest: str, blobs: dict[str, str], read: Callable[[str], bytes]
) -> AdapterState:
    """A saved state from its blobs (name -> hash); `read` gives the bytes of a hash. Raises Corrupt."""
    for name in ("weights", "adapter_config"):
        if name not in blobs:
            raise Corrupt(f"a checkpoint has no blob {name}")
    return AdapterState(
        lora=lora,
        step=step,
        weights=read(blobs["weights"]),
        adapter_config=read(blobs["adapter_config"]),
        optimizer=read(blobs["optimizer"]) if "optimizer" in blobs else None,
        digest=digest,
    )


def state_blobs(state: AdapterState) -> dict[str, bytes]:
    """The named blobs of a save.completed or checkpoint.written."""
    blobs = {"weights": state.weights, "adapter_config": state.adapter_config}
    if state.optimizer is not None:
        blobs["optimizer"] = state.optimizer
    return blobs
