"""HFExecutor: the executor port on a Hugging Face model in this process."""

import time
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeVar

import msgspec

from tinkerbell.errors import InvalidRequest, NotFound
from tinkerbell.executors.hf import checkpoint, optimizer
from tinkerbell.executors.hf.adapter import Adapter, target_shapes
from tinkerbell.executors.hf.environment import configure, facts
from tinkerbell.executors.hf.model import load
from tinkerbell.executors.hf.placement import Adapters
from tinkerbell.executors.hf.sampler import Sampler
from tinkerbell.executors.hf.trainer import Trainer
from tinkerbell.executors.meter import Meter
from tinkerbell.executors.port import (
    AdapterReport,
    AdapterState,
    Batch,
    BatchResult,
    Environment,
    ForwardBackward,
    OptimStep,
    Sample,
    Unit,
    UnitResult,
)
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.types import AdapterId, LoraConfig

U = TypeVar("U", bound=Unit)


class Extra(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `ExecutorOptions.extra` may say."""

    dtype: str = "float32"
    """Of the base model: float32, bfloat16, or float64 (for reference runs)."""
    device: str | None = None
    """A torch device; default cuda if there is one."""
    exactness: Literal["exact", "fast"] = "exact"
    """exact: what a request gives does not depend on what runs beside it, to the last bit; fast: by rounding it may."""
    activation_memory_mib: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """For what a training pass keeps until its backward; default: what 416 tokens, or the longest micro-batch, need.
    Below that passes get smaller and then compute a layer twice; no bit changes."""
    adapter_memory_mib: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Of the device, for adapters; those unused for longest lie in the host's memory meanwhile. Default: a quarter of a
    CUDA device. On a CPU both are one memory, and nothing moves."""


class HFExecutor:
    """Adapters on one frozen model; implements `port.Executor`."""

    def __init__(self, options: ExecutorOptions) -> None:
        """Loads the model. Raises InvalidRequest, NotFound or MissingPackage where it cannot."""
        if options.model is None:
            raise InvalidRequest("the hf executor needs a model: a directory, a hub id, or package:NAME")
        try:
            extra = msgspec.convert(options.extra, Extra, strict=False)
        except msgspec.ValidationError as exc:
            raise InvalidRequest(f"options of the hf executor: {exc}") from exc
        configure(options.threads)
        model = load(options.model, dtype=extra.dtype, device=extra.device)
        self._runtime = model.runtime
        self._info = model.info
        budget_mib = extra.adapter_memory_mib
        self._adapters = Adapters(model.runtime.device, None if budget_mib is None else budget_mib * 1024**2)
        exact = extra.exactness == "exact"
        self._trainer = Trainer(
            model.runtime, model.info, self._adapters, exact=exact,
            activation_bytes=None if extra.activation_memory_mib is None else extra.activation_memory_mib * 1024**2,
        )  # fmt: skip
        self._sampler = Sampler(model.runtime, model.info, self._adapters)
        self._environment = Environment(
            executor="hf",
            model=model.info,
            exact=exact and model.runtime.device.type == "cpu",
            facts={**facts(model), "exactness": extra.exactness, "products": self._trainer.products()},
        )

    def describe(self) -> Environment:
        """See the port."""
        return self._environment

    def create(self, adapter: AdapterId, lora: LoraConfig, seed: int) -> AdapterReport:
        """See the port. Raises InvalidRequest for a target the model has not got."""
        fresh = Adapter(
            lora, target_shapes(lora, self._runtime.shapes), self._runtime.adapter_dtype, self._runtime.device
        )
        fresh.initialise(seed)
        return self._put(adapter, fresh)

    def load(self, adapter: AdapterId, state: AdapterState, with_optimizer: bool) -> AdapterReport:
        """See the port. Raises InvalidRequest where the files are not those of this LoRA on this model."""
        runtime = self._runtime
        loaded = checkpoint.load(state, with_optimizer, runtime.shapes, runtime.adapter_dtype, runtime.device)
        return self._put(adapter, loaded)

    def _put(self, adapter: AdapterId, value: Adapter) -> AdapterReport:
        self._trainer.forget(adapter)
        self._adapters[adapter] = value
        self._adapters.bring([adapter])
        return AdapterReport(num_parameters=value.layout.num_parameters, step=value.step, state_digest=value.digest())

    def snapshot(self, adapter: AdapterId) -> AdapterState:
        """See the port. Raises NotFound."""
        if adapter not in self._adapters:
            raise NotFound(f"this executor has no adapter {adapter}")
        return checkpoint.save(self._adapters[adapter], self._info.tokenizer or self._info.name)

    def remove(self, adapter: AdapterId) -> None:
        """See the port."""
        self._trainer.forget(adapter)
        self._adapters.pop(adapter, None)

    def run(self, batch: Batch) -> BatchResult:
        """See the port. Rounds: every adapter's next run of like units goes with those of the other adapters."""
        started = time.perf_counter_ns()
        meter = Meter()
        results: dict[int, UnitResult] = {}
        lines: dict[AdapterId | None, list[int]] = {}
        for index, unit in enumerate(batch.units):
            lines.setdefault(unit.adapter, []).append(index)
        while any(lines.values()):
            for joins, execute in self._stages(meter):
                taken = [index for line in lines.values() for index in _leading(line, batch.units, joins)]
                taken.sort()
                self._adapters.bring(filter(None, (batch.units[index].adapter for index in taken)))
                results.update(zip(taken, execute([batch.units[index] for index in taken]), strict=True))
        # A device that works ahead of its host is waited for wherever something is read from it.
        told = self._runtime.device.type == "cpu"
        return BatchResult(
            results=[results[index] for index in range(len(batch.units))],
            busy_us=(time.perf_counter_ns() - started) // 1000,
            own_us=meter.own_us(batch.units) if told else None,
        )

    def _stages(
        self, meter: Meter
    ) -> list[tuple[Callable[[Unit], bool], Callable[[list[Unit]], Sequence[UnitResult]]]]:
        """Which units can run together, and how."""
        return [
            (_has_backward, lambda units: self._trainer.run(_of(ForwardBackward, units), meter)),
            (_is_forward, lambda units: self._trainer.run(_of(ForwardBackward, units), meter)),
            (_is(OptimStep), lambda units: optimizer.run(_of(OptimStep, units), self._adapters)),
            (_is(Sample), lambda units: self._sampler.sample(_of(Sample, units), meter)),
        ]


def _has_backward(unit: Unit) -> bool:
    return isinstance(unit, ForwardBackward) and unit.backward


def _is_forward(unit: Unit) -> bool:
    return isinstance(unit, ForwardBackward) and not unit.backward


def _is(kind: type[Unit]) -> Callable[[Unit], bool]:
    return lambda unit: isinstance(unit, kind)


def _leading(line: list[int], units: Sequence[Unit], joins: Callable[[Unit], bool]) -> list[int]:
    """Take units from the front of an adapter's line while they join the stage."""
    taken: list[int] = []
    while line and joins(units[line[0]]):
        taken.append(line.pop(0))
    return taken


def _of(kind: type[U], units: Sequence[Unit]) -> list[U]:
    return [unit for unit in units if isinstance(unit, kind)]
