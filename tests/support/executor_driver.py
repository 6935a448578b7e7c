"""Drives any executor through the port: fresh adapters, numbered requests, and comparisons of answers."""

import asyncio
import random
import struct
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import msgspec

from tinkerbell.executors.link import ExecutorLink
from tinkerbell.executors.port import (
    AdapterReport,
    AdapterState,
    Batch,
    BatchResult,
    Environment,
    Executor,
    ForwardBackward,
    ForwardBackwardDone,
    OptimStep,
    OptimStepDone,
    Sample,
    SampleDone,
    Unit,
    UnitFailed,
    UnitResult,
)
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.types import AdamParams, Datum, LoraConfig, LossSpec, SamplingParams

T = TypeVar("T")

LORA = LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj"))
ADAM = AdamParams(learning_rate=0.01)


def ints(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def floats(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def read_ints(raw: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(raw) // 4}i", raw))


def read_floats(raw: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def datum(tokens: Sequence[int], **loss_inputs: Sequence[float]) -> Datum:
    """Predicts each next token of `tokens`."""
    return Datum(ints(tokens[:-1]), ints(tokens[1:]), {name: floats(v) for name, v in loss_inputs.items()})


def random_data(seed: int, lengths: Sequence[int], vocab_size: int = 256) -> list[Datum]:
    generator = random.Random(seed)
    return [datum([generator.randrange(vocab_size) for _ in range(length + 1)]) for length in lengths]


class Driver:
    """An executor with counters for adapter names and request numbers."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.info = executor.describe().model
        self.requests = 0
        self.adapters = 0

    def name(self) -> str:
        self.adapters += 1
        return f"ad_{self.adapters}"

    def adapter(self, seed: int = 0, lora: LoraConfig = LORA) -> str:
        """A fresh adapter."""
        name = self.name()
        self.executor.create(name, lora, seed)
        return name

    def trained(self, seed: int = 0, lora: LoraConfig = LORA) -> str:
        """An adapter that has taken two steps on data of its seed, so that it differs from the base model."""
        name = self.adapter(seed, lora)
        for step in range(2):
            data = random_data(100 + 10 * seed + step, (7, 12))
            self.done(self.forward_backward(name, data), self.optim_step(name, AdamParams(learning_rate=0.05)))
        return name

    def digest(self, name: str) -> str:
        return self.executor.snapshot(name).digest

    def _request(self) -> int:
        self.requests += 1
        return self.requests

    def forward_backward(
        self, name: str, data: list[Datum], loss: LossSpec | None = None, *, backward: bool = True
    ) -> ForwardBackward:
        return ForwardBackward(
            request=self._request(), adapter=name, data=data, loss=loss or LossSpec(), backward=backward
        )

    def chunks(self, name: str, *chunks: list[Datum]) -> list[ForwardBackward]:
        """One request in several units."""
        whole = self.forward_backward(name, [])
        last = len(chunks) - 1
        return [
            msgspec.structs.replace(whole, data=data, first=i == 0, last=i == last) for i, data in enumerate(chunks)
        ]

    def optim_step(self, name: str, adam: AdamParams = ADAM) -> OptimStep:
        return OptimStep(request=self._request(), adapter=name, adam=adam)

    def sample(
        self,
        name: str | None,
        prompt: Sequence[int],
        seed: int = 0,
        prompt_targets: Sequence[Sequence[int]] | None = None,
        **params: Any,
    ) -> Sample:
        return Sample(
            request=self._request(),
            adapter=name,
            prompt=ints(prompt),
            params=SamplingParams(**({"stop_tokens": ()} | params)),
            seed=seed,
            prompt_targets=None if prompt_targets is None else b"".join(map(ints, prompt_targets)),
        )

    def run(self, *units: Unit) -> list[UnitResult]:
        """Answers, checked to be one for each unit in their order."""
        result = self.executor.run(Batch(id=f"1.{self.requests}", units=list(units)))
        assert [answer.request for answer in result.results] == [unit.request for unit in units]
        assert result.busy_us >= 0
        return result.results

    def done(self, *units: Unit) -> list[UnitResult]:
        """Like `run`; every unit must succeed with the answer of its kind."""
        results = self.run(*units)
        kinds = {ForwardBackward: ForwardBackwardDone, OptimStep: OptimStepDone, Sample: SampleDone}
        for unit, answer in zip(units, results, strict=True):
            assert isinstance(answer, kinds[type(unit)]), answer
        return results

    def refused(self, unit: Unit, *others: Unit) -> UnitFailed:
        """The failure of `unit`, which must be the caller's; `others` run in the same batch and must succeed."""
        first, *rest = self.run(unit, *others)
        assert isinstance(first, UnitFailed), first
        assert not any(isinstance(answer, UnitFailed) for answer in rest), rest
        assert first.category == "user", first
        assert first.message
        return first


def nameless(answer: UnitResult) -> UnitResult:
    """The answer without its request number, to compare two runs of the same work."""
    return msgspec.structs.replace(answer, request=0)


class InChildProcess:
    """The port's calls through an ExecutorLink, one at a time, for code that is not asynchronous."""

    def __init__(self, kind: str, options: ExecutorOptions) -> None:
        self._loop = asyncio.new_event_loop()
        self.link = ExecutorLink(kind, options)
        try:
            self._environment = self._do(self.link.start())
        except BaseException:
            self._loop.close()
            raise

    def _do(self, call: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(call)

    def close(self) -> None:
        self._do(self.link.stop())
        self._loop.close()

    def describe(self) -> Environment:
        return self._environment

    def create(self, adapter: str, lora: LoraConfig, seed: int) -> AdapterReport:
        return self._do(self.link.create(adapter, lora, seed)).value

    def load(self, adapter: str, state: AdapterState, with_optimizer: bool) -> AdapterReport:
        return self._do(self.link.load(adapter, state, with_optimizer)).value

    def snapshot(self, adapter: str) -> AdapterState:
        return self._do(self.link.snapshot(adapter)).value

    def remove(self, adapter: str) -> None:
        self._do(self.link.remove(adapter))

    def run(self, batch: Batch) -> BatchResult:
        return self._do(self.link.run(batch))
