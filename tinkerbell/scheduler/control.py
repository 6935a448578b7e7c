"""The control lane: one request that makes, loads, saves or removes an adapter."""

from dataclasses import dataclass, field

from tinkerbell.errors import ExecutorDied, InvalidRequest, TinkerbellError, Unavailable
from tinkerbell.events import kinds
from tinkerbell.executors.link import ExecutorLink, Timed
from tinkerbell.executors.port import AdapterReport
from tinkerbell.scheduler.pending import PendingRequest
from tinkerbell.scheduler.recovery import Recovery, state_blobs
from tinkerbell.scheduler.residency import Residency, Resident

ControlCompleted = kinds.AddLoraCompleted | kinds.LoadCompleted | kinds.SaveCompleted | kinds.RemoveLoraCompleted


@dataclass(frozen=True, slots=True)
class Done:
    """What a control request came to."""

    event: ControlCompleted | None
    """Its result, still without batch and cost; None where it failed."""
    busy_us: int = 0
    blobs: dict[str, bytes] = field(default_factory=dict)
    error: TinkerbellError | None = None


class Control:
    """Carries out control requests on the executor."""

    def __init__(self, recovery: Recovery, residency: Residency) -> None:
        self._recovery = recovery
        self._residency = residency

    async def run(self, link: ExecutorLink, request: PendingRequest) -> Done:
        """The outcome. Raises ExecutorDied, and Unavailable where what it needs cannot be read now."""
        try:
            return await self._run(link, request)
        except (ExecutorDied, Unavailable):
            raise
        except TinkerbellError as exc:
            if exc.category == "server" and request.adapter is not None:
                # Nobody knows how far it came; the next request restores what the log says.
                self._residency.forget(request.adapter)
            return Done(None, error=exc)

    async def _run(self, link: ExecutorLink, request: PendingRequest) -> Done:
        adapter, event = request.adapter, request.event
        assert adapter is not None
        match event:
            case kinds.AddLoraRequested():
                made = await self._make(link, request, event)
                self._settle(request, made.value)
                report = made.value
                completed: ControlCompleted = kinds.AddLoraCompleted(
                    num_parameters=report.num_parameters, step=report.step, state_digest=report.state_digest
                )
                return Done(completed, made.busy_us)
            case kinds.LoadRequested():
                loaded = await self._load(link, request, event.checkpoint, event.with_optimizer)
                self._settle(request, loaded.value)
                completed = kinds.LoadCompleted(
                    checkpoint=event.checkpoint,
                    step=loaded.value.step,
                    state_digest=loaded.value.state_digest,
                )
                return Done(completed, loaded.busy_us)
            case kinds.SaveRequested():
                return await self._save(link, adapter, event)
            case kinds.RemoveLoraRequested():
                removed = await link.remove(adapter)
                self._residency.forget(adapter)
                return Done(kinds.RemoveLoraCompleted(), removed.busy_us)
        raise AssertionError(f"{request.kind} is no control request")

    async def _make(
        self, link: ExecutorLink, request: PendingRequest, event: kinds.AddLoraRequested
    ) -> Timed[AdapterReport]:
        assert request.adapter is not None
        if event.checkpoint is None:
            await self._recovery.require_base(request.tenant, request.adapter, f"adapter {request.adapter}")
            return await link.create(request.adapter, event.lora, event.seed)
        return await self._load(link, request, event.checkpoint, event.with_optimizer)

    async def _load(
        self, link: ExecutorLink, request: PendingRequest, checkpoint: str, with_optimizer: bool
    ) -> Timed[AdapterReport]:
        assert request.adapter is not None
        await self._recovery.require_base(request.tenant, request.adapter, f"adapter {request.adapter}")
        row, state = await self._recovery.checkpoint(request.tenant, checkpoint)
        await self._recovery.require_base(request.tenant, row.adapter, f"checkpoint {checkpoint}")
        if row.lora != await self._recovery.lora(request.adapter):
            raise InvalidRequest(f"checkpoint {checkpoint} has another LoRA shape than the adapter")
        return await link.load(request.adapter, state, with_optimizer)

    async def _save(self, link: ExecutorLink, adapter: str, event: kinds.SaveRequested) -> Done:
        saved = await link.snapshot(adapter)
        state, blobs = saved.value, state_blobs(saved.value)
        if event.use != "state":
            blobs.pop("optimizer", None)
        completed = kinds.SaveCompleted(
            checkpoint=event.checkpoint,
            name=event.name,
            step=state.step,
            lora=state.lora,
            num_bytes=sum(map(len, blobs.values())),
            state_digest=state.digest,
            use=event.use,
            ttl_s=event.ttl_s,
            user_metadata=event.user_metadata,
            replaces=event.replaces,
        )
        return Done(completed, saved.busy_us, blobs)

    def _settle(self, request: PendingRequest, report: AdapterReport) -> None:
        assert request.adapter is not None and request.seq is not None
        self._residency.put(
            Resident(
                tenant=request.tenant,
                adapter=request.adapter,
                num_parameters=report.num_parameters,
                step=report.step,
                state_digest=report.state_digest,
                boundary_seq=request.seq,
                boundary_position=request.position,
            )
        )
