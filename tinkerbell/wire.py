"""Request and response bodies of `/v1`: the HTTP contract that `api/` and `sdk/` share."""

import sys
from array import array
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tinkerbell.types import MAX_TARGETS, AdamParams, Category, LoraConfig, LossSpec, Name, OutputSpec, SamplingParams

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Meta(min_length=1)]
Targets = Annotated[list[Annotated[int, Meta(ge=-1, lt=2**31)]], Meta(min_length=1, max_length=MAX_TARGETS)]
Seq = Annotated[int, Meta(ge=0)] | None
"""Optional check: refuse unless this is the adapter's next sequence number (409 otherwise)."""


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of request bodies: an unknown field is an error, because a typo is not a wish."""


class DatumBody(Body, frozen=True, kw_only=True):
    """One sequence of N tokens with K targets for each, K being `num_targets` of the request."""

    tokens: Tokens
    """[N] model input."""
    targets: Tokens
    """[N, K] the tokens to predict after each input token, row after row; nothing is shifted by the server."""
    loss_inputs: dict[str, list[float]] = {}
    """Name -> [N, K] numbers, as the loss needs: weights, logprobs, advantages."""


class AddLora(Body, frozen=True, kw_only=True):
    """POST /v1/adapters"""

    base_model: str | None = None
    """Must be the served model when given."""
    lora: LoraConfig | None = None
    """Default LoraConfig(); with a checkpoint it must be absent, the checkpoint has its own."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """Seed of the initial weights; absent: the server draws one and records it."""
    name: Name | None = None
    checkpoint: str | None = None
    """Start from this checkpoint of yours."""
    with_optimizer: bool = True
    """With a checkpoint: take its Adam moments and step count as well."""


class ForwardBackward(Body, frozen=True, kw_only=True):
    """POST /v1/adapters/{id}/fwdbwd"""

    data: Annotated[list[DatumBody], Meta(min_length=1)]
    loss: LossSpec = msgspec.field(default_factory=LossSpec)
    num_targets: Annotated[int, Meta(ge=1, le=MAX_TARGETS)] = 1
    """K: how many targets each token has, weighted by `weights`; more than one with cross_entropy only."""
    seq: Seq = None


class Forward(ForwardBackward, frozen=True, kw_only=True):
    """POST /v1/adapters/{id}/forward"""

    outputs: OutputSpec | None = None
    """What else to answer of each token's distribution; their bytes have a limit."""


class OptimStep(Body, frozen=True, kw_only=True):
    """POST /v1/adapters/{id}/optim_step"""

    adam: AdamParams = AdamParams()
    seq: Seq = None


class Sample(Body, frozen=True, kw_only=True):
    """POST /v1/adapters/{id}/sample, and /v1/sample for the base model"""

    prompt: Tokens
    """[P]"""
    params: SamplingParams = SamplingParams()
    prompt_targets: Annotated[list[Targets], Meta(min_length=1)] | None = None
    """[P, K] at each position of the prompt as many tokens, whose logprobs given the tokens before it are answered; -1
    is none. Position 0 has no tokens before it: whatever it holds is answered with null."""


class Save(Body, frozen=True, kw_only=True):
    """POST /v1/adapters/{id}/checkpoints"""

    name: Name | None = None
    """No other checkpoint of the adapter may have it."""
    overwrite: bool = False
    """The one that has the name is deleted once this one is there."""
    seq: Seq = None


class Load(Body, frozen=True, kw_only=True):
    """POST /v1/adapters/{id}/load"""

    checkpoint: str
    with_optimizer: bool = True
    seq: Seq = None


# ---- the seed's aliases: the same calls with the adapter in the body --------------------------------------------


class ForwardBackwardFor(ForwardBackward, frozen=True, kw_only=True):
    """POST /fwdbwd"""

    adapter_id: str


class OptimStepFor(OptimStep, frozen=True, kw_only=True):
    """POST /optim_step"""

    adapter_id: str


class SampleFor(Sample, frozen=True, kw_only=True):
    """POST /sample"""

    adapter_id: str | None = None


class RetrieveFuture(Body, frozen=True, kw_only=True):
    """POST /retrieve_future"""

    future_id: int
    wait_s: Annotated[float, Meta(ge=0, le=60)] = 0.0


# ---- answers ----------------------------------------------------------------------------------------------------


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request failed."""

    category: Category
    code: str
    message: str


class LogitsBody(msgspec.Struct, frozen=True, kw_only=True):
    """Logits of one datum. As JSON numbers they would be several times as long."""

    shape: tuple[int, int]
    """[N, V]: tokens of the datum, and of the vocabulary."""
    data: bytes
    """Base64 of float32 numbers, little-endian, one token after another."""

    def rows(self) -> "memoryview[float]":
        """[N, V] float32: `rows()[n, v]`, `rows().tolist()` or `numpy.asarray(rows())`."""
        numbers = array("f", self.data)
        if sys.byteorder == "big":
            numbers.byteswap()
        return memoryview(numbers).cast("B").cast("f", self.shape)


class OutputsBody(msgspec.Struct, frozen=True, kw_only=True):
    """What `outputs` asked for, of one datum; null where it was not asked for."""

    entropy: list[float] | None = None
    """[N] nats."""
    logsumexp: list[float] | None = None
    """[N] of the logits."""
    top_tokens: list[list[int]] | None = None
    """[N, k] likeliest first."""
    top_logprobs: list[list[float]] | None = None
    """[N, k] nats."""
    logits: LogitsBody | None = None


class ForwardBackwardResult(msgspec.Struct, frozen=True, kw_only=True, tag="forward_backward"):
    """Answer of forward and fwdbwd."""

    loss: float
    """Sum over tokens."""
    metrics: dict[str, float]
    logprobs: list[list[float]]
    """For each datum [N, K] nats, row after row."""
    num_tokens: int
    num_targets: int = 1
    """K."""
    outputs: list[OutputsBody] | None = None
    """For each datum, where a forward asked for them."""


class OptimStepResult(msgspec.Struct, frozen=True, kw_only=True, tag="optim_step"):
    """Answer of optim_step."""

    step: int
    grad_norm: float
    state_digest: str


class SequenceBody(msgspec.Struct, frozen=True, kw_only=True):
    """One continuation."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: Literal["stop", "length"]
    top_tokens: list[list[int]] | None = None
    """[M, k] likeliest first, where they were asked for."""
    top_logprobs: list[list[float]] | None = None
    """[M, k] nats."""


class SampleResult(msgspec.Struct, frozen=True, kw_only=True, tag="sample"):
    """Answer of sample."""

    sequences: list[SequenceBody]
    prompt_logprobs: list[float] | None
    """[P - 1] nats of prompt tokens 1.. when they were asked for."""
    step: int
    """Optimizer steps behind the weights that sampled."""
    prompt_top_tokens: list[list[int]] | None = None
    """[P - 1, k] at prompt positions 1.., likeliest first, where they were asked for."""
    prompt_top_logprobs: list[list[float]] | None = None
    """[P - 1, k] nats."""
    prompt_target_logprobs: list[list[float | None]] | None = None
    """[P, K] nats of `prompt_targets`; null at position 0 and where there was none."""
    prompt_drawn_tokens: list[list[int]] | None = None
    """[P - 1, d] drawn at prompt positions 1.., where they were asked for."""
    prompt_drawn_logprobs: list[list[float]] | None = None
    """[P - 1, d] nats."""


class AddLoraResult(msgspec.Struct, frozen=True, kw_only=True, tag="add_lora"):
    """Answer of add_lora."""

    adapter_id: str
    num_parameters: int
    step: int
    state_digest: str


class SaveResult(msgspec.Struct, frozen=True, kw_only=True, tag="save"):
    """Answer of save."""

    checkpoint_id: str
    name: str | None
    step: int
    num_bytes: int


class LoadResult(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """Answer of load."""

    checkpoint_id: str
    step: int
    state_digest: str


class RemoveLoraResult(msgspec.Struct, frozen=True, kw_only=True, tag="remove_lora"):
    """Answer of remove_lora."""


ResultBody = (
    ForwardBackwardResult | OptimStepResult | SampleResult | AddLoraResult | SaveResult | LoadResult | RemoveLoraResult
)


class Future(msgspec.Struct, frozen=True, kw_only=True):
    """A request and, once there is one, its answer."""

    id: int
    """Position of the request in the log."""
    kind: str
    state: Literal["pending", "completed", "failed"]
    adapter_id: str | None
    seq: int | None
    created_at: str
    """RFC 3339, UTC."""
    finished_at: str | None = None
    cost_us: int | None = None
    """Accelerator microseconds billed for it."""
    place: int | None = None
    """Pending: how many pending requests of yours were accepted before it."""
    result: ResultBody | None = None
    error: Failure | None = None


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/adapters/{id}"""

    id: str
    name: str | None
    base_model: str
    lora: LoraConfig
    seed: int
    state: Literal["pending", "ready", "failed", "removed"]
    num_parameters: int | None
    step: int
    """Optimizer steps taken."""
    next_seq: int
    last_loss: float | None
    created_at: str
    parent_checkpoint: str | None


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/checkpoints/{id}"""

    id: str
    name: str | None
    adapter_id: str
    step: int
    lora: LoraConfig
    num_bytes: int
    state_digest: str
    created_at: str


class RunPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer step of a run."""

    step: int
    at: str
    learning_rate: float
    grad_norm: float | None
    """None where it was not finite."""
    loss_per_token: float | None
    """Sum of the losses since the step before, over the number of their tokens; None where there were none or it was
    not finite."""
    num_tokens: int
    state_digest: str


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """The history of one adapter."""

    adapter: Adapter
    num_requests: int
    num_failed: int
    num_tokens: int
    cost_us: int
    points: list[RunPoint] = []


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one adapter used, by kind of request."""

    tenant: str
    adapter_id: str | None
    kind: str
    num_requests: int
    tokens_in: int
    tokens_out: int
    cost_us: int


class TenantQueue(msgspec.Struct, frozen=True, kw_only=True):
    """What waits and what was served, for one tenant."""

    tenant: str
    weight: float
    num_pending: int
    pending_tokens: int
    cost_us: int
    """Served since the server's first day."""
    recent_cost_us: int
    """Served in the last 60 s."""
    recent_tokens: int


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/queue: your own line; every tenant's with an admin key."""

    tenants: list[TenantQueue]
    position: int
    """Head of the log."""


class Quota(msgspec.Struct, frozen=True, kw_only=True):
    """How much there is of one thing, and may be."""

    used: int
    limit: int


class Quotas(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/limits: what you have of everything that is limited."""

    tenant: str
    quotas: dict[str, Quota]
    """By name, as in the setting `limits.max_<name>` and in a problem's `quota`."""


class LogEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of your log, as GET /v1/events streams it."""

    position: int
    at: str
    type: str
    adapter_id: str | None
    seq: int | None
    causation: int | None
    data: dict[str, Any]
    hash: str


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """GET /healthz"""

    status: Literal["ok", "failed"]
    """failed: the scheduler of this process has ended; a restart continues what is pending."""
    durability: Literal["full", "relaxed"]
    """relaxed: the last commits may be lost with the machine's power, never with a process."""
    version: str


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """GET /readyz"""

    ready: bool
    reason: str
    """Why not; empty when ready."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """RFC 9457 body of every error."""

    type: str
    """urn:tinkerbell:problem:<slug>"""
    title: str
    status: int
    detail: str
