"""HFExecutor: the executor port on a Hugging Face model in this process."""

import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from tinkerbell.errors import InvalidRequest, NotFound, UserError
from tinkerbell.executors.hf import checkpoint, optimizer
from tinkerbell.executors.hf.adapter import Adapter, target_shapes
from tinkerbell.executors.hf.environment import configure, facts
from tinkerbell.executors.hf.failures import failed
from tinkerbell.executors.hf.model import load
from tinkerbell.executors.hf.sampler import Sampler
from tinkerbell.executors.hf.trainer import Trainer
from tinkerbell.executors.port import (
    AdapterReport,
    AdapterState,
    Batch,
    BatchResult,
    Environment,
    ForwardBackward,
    OptimStep,
    OptimStepDone,
    Sample,
    Unit,
    UnitFailed,
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


class HFExecutor:
    """Adapters on one frozen model; implements `port.Executor`."""

    def __init__(self, options: ExecutorOptions) -> None:
        """Loads the model. Raises InvalidRequest, NotFound or MissingPackage where it cannot."""
        if options.model is None:
            raise InvalidRequest("the hf executor needs a model: a directory, a hub id, or package:NAME")
        try:
            extra = msgspec.convert(options.extra, Extra)
        except msgspec.ValidationError as exc:
            raise InvalidRequest(f"options of the hf executor: {exc}") from exc
        configure(options.threads or os.cpu_count() or 1)
        model = load(options.model, dtype=extra.dtype, device=extra.device)
        self._runtime = model.runtime
        self._info = model.info
        self._adapters: dict[AdapterId, Adapter] = {}
        self._trainer = Trainer(model.runtime, model.info, self._adapters)
        self._sampler = Sampler(model.runtime, model.info, self._adapters)
        self._environment = Environment(
            executor="hf",
            model=model.info,
            exact=model.runtime.device.type == "cpu",
            facts=facts(model),
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
        return AdapterReport(num_parameters=value.layout.num_parameters, step=value.step, state_digest=value.digest())

    def snapshot(self, adapter: AdapterId) -> AdapterState:
        """See the port. Raises NotFound."""
        if adapter not in self._adapters:
            raise NotFound(f"this executor has no adapter {adapter}")
        return checkpoint.save(self._adapters[adapter], self._info.name)

    def remove(self, adapter: AdapterId) -> None:
        """See the port."""
        self._trainer.forget(adapter)
        self._adapters.pop(adapter, None)

    def run(self, batch: Batch) -> BatchResult:
        """See the port. Rounds: every adapter's next run of like units goes with those of the other adapters."""
        started = time.perf_counter_ns()
        results: dict[int, UnitResult] = {}
        lines: dict[AdapterId | None, list[int]] = {}
        for index, unit in enumerate(batch.units):
            lines.setdefault(unit.adapter, []).append(index)
        while any(lines.values()):
            for kind, execute in self._stages():
                taken = [index for line in lines.values() for index in _leading(line, batch.units, kind)]
                taken.sort()
                results.update(zip(taken, execute([batch.units[index] for index in taken]), strict=True))
        return BatchResult(
            results=[results[index] for index in range(len(batch.units))],
            busy_us=(time.perf_counter_ns() - started) // 1000,
        )

    def _stages(self) -> list[tuple[type[Unit], Callable[[list[Unit]], Sequence[UnitResult]]]]:
        return [
            (ForwardBackward, lambda units: self._trainer.run(_of(ForwardBackward, units))),
            (OptimStep, lambda units: [self._optim_step(unit) for unit in _of(OptimStep, units)]),
            (Sample, lambda units: self._sampler.sample(_of(Sample, units))),
        ]

    def _optim_step(self, unit: OptimStep) -> OptimStepDone | UnitFailed:
        adapter = self._adapters.get(unit.adapter)
        try:
            if adapter is None:
                raise NotFound(f"this executor has no adapter {unit.adapter}")
            grad_norm = optimizer.step(adapter, unit.adam)
        except UserError as exc:
            return failed(unit.request, exc)
        return OptimStepDone(
            request=unit.request, step=adapter.step, grad_norm=grad_norm, state_digest=adapter.digest()
        )


def _leading(line: list[int], units: Sequence[Unit], kind: type[Unit]) -> list[int]:
    """Take the units of `kind` from the front of an adapter's line."""
    taken: list[int] = []
    while line and isinstance(units[line[0]], kind):
        taken.append(line.pop(0))
    return taken


def _of(kind: type[U], units: Sequence[Unit]) -> list[U]:
    return [unit for unit in units if isinstance(unit, kind)]
