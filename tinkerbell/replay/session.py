"""A replay's own executor: a process beside the server, with one adapter in it."""

import asyncio
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from tinkerbell.errors import InvalidRequest, NotFound
from tinkerbell.events import kinds
from tinkerbell.events.kinds import EnvironmentRecorded, Recorded
from tinkerbell.executors.link import ExecutorLink
from tinkerbell.executors.port import (
    AdapterReport,
    AdapterState,
    Batch,
    Environment,
    ForwardBackwardDone,
    OptimStepDone,
    SampleDone,
    Unit,
    UnitFailed,
    UnitResult,
)
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.replay.history import Call
from tinkerbell.replay.log import Log, blob_of, body_of
from tinkerbell.scheduler.recovery import adapter_state
from tinkerbell.scheduler.results import combine
from tinkerbell.scheduler.units import units_again
from tinkerbell.types import AdamParams, DatumOutputs

HARMLESS = "fake"
"""The one kind of executor that reads no file and loads no code: an archive may name it."""
HARMLESS_OPTIONS = ("vocab_size", "max_length", "rounding_ppm")
"""Of that one, those that do not make it wait."""

Change = Callable[[AdamParams], AdamParams]


class ExecutorChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What the replay's executor is started with; None: as it was recorded."""

    executor: str | None = None
    model: str | None = None
    threads: int | None = None
    options: dict[str, str] | None = None
    trusting: bool = False
    """What a foreign archive says is taken as if it were this server's own log."""

    def of(self, recorded: EnvironmentRecorded, *, foreign: bool) -> tuple[str, ExecutorOptions]:
        """(entry point, options) for an environment of the log. Raises InvalidRequest where a foreign log says what
        was not asked for here: an executor is code that runs, and a model is a place that it reads."""
        kind = self.executor or recorded.executor
        if foreign and not self.trusting:
            if kind != HARMLESS and None in (self.executor, self.model):
                said = "".join(f", {name}={value}" for name, value in sorted(recorded.options.items()))
                raise InvalidRequest(
                    f"this archive says to execute it with the executor {recorded.executor!r}, model"
                    f" {recorded.source!r}{said}. Say which to use with --executor and --model (and its options with"
                    " --executor-option), or --trust-archive to do as it says"
                )
            kept = HARMLESS_OPTIONS if kind == recorded.executor == HARMLESS else ()
            recorded = msgspec.structs.replace(
                recorded,
                source=None,
                model=msgspec.structs.replace(recorded.model, tokenizer=""),
                options={name: value for name, value in recorded.options.items() if name in kept},
            )
        threads = re.fullmatch("[0-9]{1,4}", recorded.facts.get("threads", ""))
        # A log of an older release says only where the model's tokenizer is, which is where the model is.
        source = recorded.source or recorded.model.tokenizer or None
        return kind, ExecutorOptions(
            model=self.model if self.model is not None else source,
            threads=self.threads if self.threads is not None else int(threads[0]) if threads else None,
            extra=self.options if self.options is not None else recorded.options,
        )


@dataclass(frozen=True, slots=True)
class Passed:
    """A forward or forward_backward, its chunks put together."""

    loss: float
    metrics: dict[str, float]
    logprobs: list[bytes]
    """For each datum [N] float32 nats."""
    outputs: list[DatumOutputs]
    """Of each datum, where a forward asked for them."""


Outcome = Passed | OptimStepDone | SampleDone | UnitFailed


class Session:
    """One executor process and one adapter. Belongs to one event loop; `stop` it in the end."""

    def __init__(self, log: Log, adapter: str, kind: str, options: ExecutorOptions) -> None:
        self._log = log
        self._adapter = adapter
        self._link = ExecutorLink(kind, options)
        self._num_batches = 0

    async def start(self) -> Environment:
        """Raises what the executor raises when it cannot start."""
        return await self._link.start()

    async def stop(self) -> None:
        """End the process."""
        await self._link.stop()

    async def begin(self, origin: Recorded) -> AdapterReport:
        """Put a state in the adapter's place that an event of ORIGINS names. Raises NotFound, Corrupt."""
        event = origin.event
        if isinstance(event, kinds.SaveCompleted | kinds.CheckpointWritten):
            return await self.load(self._state(event, origin.blobs), with_optimizer=True)
        assert origin.causation is not None
        requests = self._log.entries(origin.causation - 1, until=origin.causation)
        return await self.make(next(requests).recorded)

    async def make(self, request: Recorded) -> AdapterReport:
        """Carry out an add_lora or load. Raises NotFound, Corrupt."""
        asked = request.event
        assert isinstance(asked, kinds.AddLoraRequested | kinds.LoadRequested)
        if asked.checkpoint is None:
            assert isinstance(asked, kinds.AddLoraRequested)
            return (await self._link.create(self._adapter, asked.lora, asked.seed)).value
        found = self._log.checkpoint(request.tenant, asked.checkpoint)
        if found is None:
            raise NotFound(f"no checkpoint {asked.checkpoint} in {self._log.name}")
        made = found.recorded.event
        assert isinstance(made, kinds.AnyCheckpoint)
        return await self.load(self._state(made, found.recorded.blobs), with_optimizer=asked.with_optimizer)

    async def load(self, state: AdapterState, *, with_optimizer: bool) -> AdapterReport:
        """Executor.load."""
        return (await self._link.load(self._adapter, state, with_optimizer)).value

    async def snapshot(self) -> AdapterState:
        """Executor.snapshot."""
        return (await self._link.snapshot(self._adapter)).value

    async def run(self, calls: Sequence[Call], change: Change | None = None) -> list[Outcome]:
        """Execute requests together, in order; with `change`, optim_steps with other settings than recorded."""
        cut = [await asyncio.to_thread(self._units, call, change) for call in calls]
        self._num_batches += 1
        batch = Batch(id=f"replay.{self._num_batches}", units=[unit for units in cut for unit in units])
        answers = iter((await self._link.run(batch)).results)
        return [_together([next(answers) for _ in units]) for units in cut]

    def _units(self, call: Call, change: Change | None) -> list[Unit]:
        recorded = call.request.recorded
        if change is not None and isinstance(recorded.event, kinds.OptimStepRequested):
            changed = kinds.OptimStepRequested(adam=change(recorded.event.adam))
            recorded = msgspec.structs.replace(recorded, event=changed)
        return units_again(recorded, body_of(self._log, call.request))

    def _state(self, event: kinds.AnyCheckpoint, blobs: dict[str, str]) -> AdapterState:
        return adapter_state(event.lora, event.step, event.state_digest, blobs, functools.partial(blob_of, self._log))


def _together(answers: Sequence[UnitResult]) -> Outcome:
    """The outcome of a request from those of its chunks."""
    for answer in answers:
        if isinstance(answer, UnitFailed | OptimStepDone | SampleDone):
            return answer
    loss, metrics, body = combine([answer for answer in answers if isinstance(answer, ForwardBackwardDone)])
    return Passed(loss, metrics, body.logprobs, body.outputs)
