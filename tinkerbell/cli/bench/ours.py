"""The HF executor in this process, as the benchmarks use it: through the port, nothing private."""

import random
from collections.abc import Sequence

import msgspec

from tinkerbell.cli.bench.workload import Tenant, random_datum
from tinkerbell.errors import ServerError
from tinkerbell.executors.hf.executor import Extra, HFExecutor
from tinkerbell.executors.port import (
    AdapterState,
    Batch,
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
from tinkerbell.types import AdamParams, AdapterId, LoraConfig, LossSpec, SamplingParams

WARM_TOKENS = 16
EXACTNESS = "exactness"
"""Option of the executor whose value `fast` gives up equal bits for speed."""
DEVICE = {"device": "cpu"}
"""CPU seconds are what is compared."""


def has_fast_mode() -> bool:
    """Whether this release's executor offers it."""
    return EXACTNESS in {field.name for field in msgspec.structs.fields(Extra)}


class Ours:
    """An executor with adapters whose B is not zero any more, so that a wrong LoRA would show in the loss."""

    def __init__(self, model: str, threads: int, *, fast: bool = False) -> None:
        """Loads the model; errors as of HFExecutor."""
        extra = DEVICE | ({EXACTNESS: "fast"} if fast else {})
        self.executor = HFExecutor(ExecutorOptions(model=model, threads=threads, extra=extra))
        self.info = self.executor.describe().model
        self.num_parameters: dict[AdapterId, int] = {}
        self.states: dict[AdapterId, AdapterState] = {}
        """What each adapter begins from, without Adam moments."""
        self._requests = 0

    def create(self, adapter: AdapterId, lora: LoraConfig, seed: int) -> None:
        """An adapter that has taken one step."""
        self.executor.create(adapter, lora, seed)
        datum = random_datum(WARM_TOKENS, self.info.vocab_size, random.Random(seed))
        step = OptimStep(request=self._request(), adapter=adapter, adam=AdamParams(learning_rate=1e-3))
        self._run([self._unit(Tenant(adapter=adapter, lora=lora, data=[datum])), step])
        state = self.executor.snapshot(adapter)
        self.load({adapter: msgspec.structs.replace(state, optimizer=None)})

    def load(self, states: dict[AdapterId, AdapterState]) -> None:
        """Take these adapters, as `states` of another has them."""
        self.states |= states
        for adapter, state in states.items():
            report = self.executor.load(adapter, state, with_optimizer=False)
            self.num_parameters[adapter] = report.num_parameters

    def reset(self) -> None:
        """Put all adapters back to where they began; accumulated gradients are dropped."""
        self.load(self.states)

    def together(self, tenants: Sequence[Tenant]) -> list[float]:
        """Losses of all requests in one batch."""
        return self._losses([self._unit(tenant) for tenant in tenants])

    def one_at_a_time(self, tenants: Sequence[Tenant]) -> list[float]:
        """The same, a batch for each."""
        return [loss for tenant in tenants for loss in self._losses([self._unit(tenant)])]

    def step(self, tenants: Sequence[Tenant], adam: AdamParams) -> list[str]:
        """State digests after one fwdbwd and one optim_step of each, all in one batch."""
        units: list[Unit] = [self._unit(tenant) for tenant in tenants]
        units += [OptimStep(request=self._request(), adapter=tenant.adapter, adam=adam) for tenant in tenants]
        return [answer.state_digest for answer in self._run(units) if isinstance(answer, OptimStepDone)]

    def sample(self, prompts: Sequence[tuple[AdapterId, bytes]], max_tokens: int) -> list[bytes]:
        """Greedy continuations of `max_tokens` tokens, int32, all in one batch."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_tokens=())
        units = [
            Sample(request=self._request(), adapter=adapter, prompt=prompt, params=params, seed=1)
            for adapter, prompt in prompts
        ]
        answers = self._run(units)
        return [answer.sequences[0].tokens for answer in answers if isinstance(answer, SampleDone)]

    def _losses(self, units: Sequence[Unit]) -> list[float]:
        return [answer.loss for answer in self._run(units) if isinstance(answer, ForwardBackwardDone)]

    def _unit(self, tenant: Tenant) -> ForwardBackward:
        return ForwardBackward(request=self._request(), adapter=tenant.adapter, data=tenant.data, loss=LossSpec())

    def _request(self) -> int:
        self._requests += 1
        return self._requests

    def _run(self, units: Sequence[Unit]) -> list[UnitResult]:
        """Raises ServerError where a unit failed: a benchmark of refusals would be fast."""
        results = self.executor.run(Batch(id="bench.1", units=list(units))).results
        for result in results:
            if isinstance(result, UnitFailed):
                raise ServerError(f"request {result.request} of the benchmark failed: {result.message}")
        return results
