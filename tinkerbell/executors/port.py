"""What the scheduler knows of an executor: units of work, results, and the calls between them.

An executor holds one frozen base model and the state of many adapters (weights, Adam moments, accumulated
gradients) in its memory. That state is a function of the calls it has answered; nothing here is durable.

Bits: the result of a unit is a function of its adapter's own earlier units and of the unit itself, never of the
other units of the batch, their order, or the batch's size. The conformance suite holds every executor to it.
"""

from typing import Protocol

import msgspec

from tinkerbell.types import (
    AdamParams,
    AdapterId,
    Category,
    Datum,
    DatumOutputs,
    LoraConfig,
    LossSpec,
    ModelInfo,
    OutputSpec,
    PromptScores,
    SampledSequence,
    SamplingParams,
)


class ForwardBackward(msgspec.Struct, frozen=True, kw_only=True, tag="forward_backward"):
    """A chunk of a forward_backward request (or of a forward, when `backward` is false).

    Chunks of one request come in order, `first` and `last` mark its ends. Gradients of a request are added to the
    adapter's accumulated gradient when its last chunk has succeeded: a failed request leaves none behind.
    """

    request: int
    """Position of the request in the log."""
    adapter: AdapterId
    data: list[Datum]
    loss: LossSpec
    outputs: OutputSpec | None = None
    """What else to answer of each token's distribution."""
    backward: bool = True
    first: bool = True
    last: bool = True


class OptimStep(msgspec.Struct, frozen=True, kw_only=True, tag="optim_step"):
    """Apply the accumulated gradient and clear it. Without one it fails (category user). So it does where the gradient
    or the new weights are not finite: weights, moments and step count stay as they were, the gradient is dropped."""

    request: int
    adapter: AdapterId
    adam: AdamParams


class Sample(msgspec.Struct, frozen=True, kw_only=True, tag="sample"):
    """Continue one prompt with the adapter's present weights, or with the base model's."""

    request: int
    adapter: AdapterId | None
    prompt: bytes
    """[P] int32, P >= 1."""
    params: SamplingParams
    seed: int
    """Key of this request's counter-based random numbers; already resolved from params.seed."""
    start: int = 0
    stop: int | None = None
    """Samples [start, stop) of the params.num_samples; None: to the last. Each is drawn as if all were."""
    draws_start: int = 0
    draws_stop: int | None = None
    """Draws [draws_start, draws_stop) of the params.prompt_draws at each position; None: to the last. As with samples,
    each is drawn as if all were."""
    prompt_targets: bytes | None = None
    """[P, K] int32: at each position of the prompt K tokens whose logprobs are asked for; -1 is none."""

    @property
    def draws(self) -> range:
        """Which draws to make at each position of the prompt."""
        return range(self.draws_start, self.params.prompt_draws if self.draws_stop is None else self.draws_stop)

    @property
    def indices(self) -> range:
        """Which samples to draw; none where only the prompt is asked about."""
        return range(self.start, self.params.num_samples if self.stop is None else self.stop)


Unit = ForwardBackward | OptimStep | Sample


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Units to run together. Units of one adapter are in request order; an optim_step follows that adapter's chunks."""

    id: str
    """`epoch.number` of the scheduler leader that planned it."""
    units: list[Unit]


class ForwardBackwardDone(msgspec.Struct, frozen=True, kw_only=True, tag="forward_backward"):
    """One chunk's answer."""

    request: int
    loss: float
    """Sum over the chunk's tokens, not a mean."""
    metrics: dict[str, float]
    """Sums over the chunk, so that chunks add."""
    logprobs: list[bytes]
    """For each datum [N, K] float32 nats: logprob of each target."""
    outputs: list[DatumOutputs] | None = None
    """Of each datum, where they were asked for."""


class OptimStepDone(msgspec.Struct, frozen=True, kw_only=True, tag="optim_step"):
    """The adapter after its step."""

    request: int
    step: int
    """Optimizer steps taken so far, this one included."""
    grad_norm: float
    """L2 norm of the accumulated gradient before clipping."""
    state_digest: str
    """sha256 (hex) over weights, Adam moments and step count."""
    gradient_digest: str | None = None
    """sha256 (hex) over the accumulated gradient before clipping; None where the executor cannot tell."""
    weights_digest: str | None = None
    """sha256 (hex) over the weights after the step; None where the executor cannot tell."""


class SampleDone(msgspec.Struct, frozen=True, kw_only=True, tag="sample"):
    """Continuations of one prompt."""

    request: int
    sequences: list[SampledSequence]
    prompt_logprobs: bytes | None
    """[P - 1] float32 nats of prompt tokens 1.. when they were asked for."""
    prompt_scores: PromptScores | None = None
    """What else was asked for of the prompt; None where nothing was."""


class UnitFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The unit had no effect on its adapter (but see OptimStep), and the units of other adapters are untouched."""

    request: int
    category: Category
    code: str
    message: str


UnitResult = ForwardBackwardDone | OptimStepDone | SampleDone | UnitFailed


class BatchResult(msgspec.Struct, frozen=True, kw_only=True):
    """Answers in the order of the batch's units, one for each."""

    results: list[UnitResult]
    busy_us: int
    """Accelerator time the batch took, microseconds."""
    own_us: list[int] | None = None
    """Of that, what each unit had the executor to itself for; the rest was shared. None: the executor cannot tell."""


class AdapterState(msgspec.Struct, frozen=True, kw_only=True):
    """All of an adapter at an optimizer boundary, in files PEFT reads as they are."""

    lora: LoraConfig
    step: int
    weights: bytes
    """adapter_model.safetensors."""
    adapter_config: bytes
    """adapter_config.json."""
    optimizer: bytes | None
    """Safetensors of the Adam moments; None where only weights were kept."""
    digest: str
    """state_digest of the adapter this was taken from."""


class AdapterReport(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter just created or loaded."""

    num_parameters: int
    step: int
    state_digest: str


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides bits: equal fingerprints promise equal bits."""

    executor: str
    model: ModelInfo
    exact: bool
    """Whether the promise of this module holds bit for bit."""
    facts: dict[str, str]
    """Base weights hash, library versions, device, dtype, threads, deterministic flags, micro-batch rule."""


class Executor(Protocol):
    """One process's worth of adapters on one base model. Calls never overlap.

    A call that takes long says `progress.mark()` again and again, every few seconds at the most: one that has not for
    the server's `executor_silence_s` is taken for hung, and the process killed.

    Errors of a caller's making are raised as `errors.UserError`; anything else is the server's.
    """

    def describe(self) -> Environment:
        """The base model and the environment; never changes in a process's life."""
        ...

    def create(self, adapter: AdapterId, lora: LoraConfig, seed: int) -> AdapterReport:
        """A fresh adapter: A uniform from the seed (Kaiming, as PEFT), B zero. An existing one is replaced."""
        ...

    def load(self, adapter: AdapterId, state: AdapterState, with_optimizer: bool) -> AdapterReport:
        """Put a saved state in the adapter's place (it need not exist), gradients cleared.
        Without the optimizer its moments and step count start from zero."""
        ...

    def snapshot(self, adapter: AdapterId) -> AdapterState:
        """A copy of the adapter's weights and optimizer. Accumulated gradients are not part of it."""
        ...

    def remove(self, adapter: AdapterId) -> None:
        """Forget the adapter; unknown names are fine."""
        ...

    def run(self, batch: Batch) -> BatchResult:
        """Run every unit. A unit that cannot be done gives UnitFailed; only a broken process raises."""
        ...
