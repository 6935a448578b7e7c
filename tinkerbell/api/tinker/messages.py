"""JSON bodies of the tinker protocol. Unlike those of `/v1` they tolerate unknown fields: each release of the SDK has
its own, and its constant `type` says nothing."""

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
TEN_YEARS_S = 315_576_000
SeqId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
CLONE_SEQS = 10**9
"""Clients of one sampling session number their samples from a multiple of this on."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of requests."""


class ClientConfig(Message, frozen=True, kw_only=True):
    """POST client/config, client/dynamic_config"""

    sdk_version: str


class CreateSession(Message, frozen=True, kw_only=True):
    """POST create_session"""

    sdk_version: str
    tags: list[str] = []
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None
    project_id: str | None = None


class Heartbeat(Message, frozen=True, kw_only=True):
    """POST session_heartbeat"""

    session_id: str


class FinishReason(Message, frozen=True, kw_only=True):
    """Why a session ends."""

    type: str = "success"


class FinishSession(Message, frozen=True, kw_only=True):
    """POST sessions/{id}/finish"""

    reason: FinishReason = FinishReason()
    detail: str | None = None


class SearchOwner(Message, frozen=True, kw_only=True):
    """Whose sessions."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] = []


class SessionStatusQuery(Message, frozen=True, kw_only=True):
    """A status, and of those that finished how."""

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[str] | None = None


class SessionSearchCursor(Message, frozen=True, kw_only=True):
    """Where the page before ended."""

    last_created_at: datetime
    last_session_id: str


class SearchSessions(Message, frozen=True, kw_only=True):
    """POST sessions/search"""

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = None
    owner: SearchOwner = SearchOwner()
    statuses: list[SessionStatusQuery] | None = None
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: SessionSearchCursor | None = None


class LoraConfigBody(Message, frozen=True, kw_only=True):
    """Which layers, and how wide."""

    rank: Annotated[int, Meta(ge=1, le=1024)]
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Message, frozen=True, kw_only=True):
    """Which optimizer."""

    type: str = "adamw"


class CreateModel(Message, frozen=True, kw_only=True):
    """POST create_model"""

    session_id: str
    model_seq_id: SeqId
    base_model: str
    lora_config: LoraConfigBody
    user_metadata: dict[str, str] | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()


class GetInfo(Message, frozen=True, kw_only=True):
    """POST get_info"""

    model_id: str


class AdamParamsBody(Message, frozen=True, kw_only=True):
    """As types.AdamParams, with the SDK's defaults."""

    learning_rate: Annotated[float, Meta(ge=0, le=10)] = 1e-4
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Meta(ge=1e-20, le=1)] = 1e-12
    weight_decay: Annotated[float, Meta(ge=0, le=10)] = 0.0
    grad_clip_norm: Annotated[float, Meta(ge=0, le=1e9)] = 0.0


class OptimStep(Message, frozen=True, kw_only=True):
    """POST optim_step"""

    model_id: str
    seq_id: SeqId
    adam_params: AdamParamsBody | None = None
    optimizer_params: dict[str, Any] | None = None


class SaveWeights(Message, frozen=True, kw_only=True):
    """POST save_weights, save_weights_external"""

    model_id: str
    seq_id: SeqId
    path: str
    overwrite: bool = False
    ttl_seconds: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    user_metadata: dict[str, str] | None = None
    age_encryption_recipients: list[str] | None = None


class SaveWeightsForSampler(Message, frozen=True, kw_only=True):
    """POST save_weights_for_sampler; without a path the weights are for one sampling session only"""

    model_id: str
    seq_id: SeqId
    path: str | None = None
    sampling_session_seq_id: SeqId | None = None
    kind: str = "snapshot"
    ttl_seconds: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    user_metadata: dict[str, str] | None = None


class LoadWeights(Message, frozen=True, kw_only=True):
    """POST load_weights; into a model, or with a session a new one"""

    path: str
    optimizer: bool = False
    model_id: str | None = None
    seq_id: SeqId | None = None
    session_id: str | None = None
    model_seq_id: SeqId | None = None
    base_model: str | None = None
    user_metadata: dict[str, str] | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()
    weights_access_token: str | None = None


class CopyWeights(Message, frozen=True, kw_only=True):
    """POST copy_weights; into a new session of a project, or as a model of a session"""

    source_path: str
    destination_project_id: str | None = None
    session_id: str | None = None
    model_seq_id: SeqId | None = None
    ttl_seconds: Annotated[int, Meta(ge=3600, le=TEN_YEARS_S)] | None = None
    weights_access_token: str | None = None


class AssignProject(Message, frozen=True, kw_only=True):
    """PUT sessions/{id}/project"""

    project_id: str


class CreateSamplingSession(Message, frozen=True, kw_only=True):
    """POST create_sampling_session"""

    session_id: str
    sampling_session_seq_id: SeqId
    base_model: str | None = None
    model_path: str | None = None


class PromptChunk(Message, frozen=True, kw_only=True):
    """A piece of a prompt."""

    type: str
    tokens: list[TokenId] = []


class Prompt(Message, frozen=True, kw_only=True):
    """A prompt in pieces."""

    chunks: list[PromptChunk]


class SamplingParamsBody(Message, frozen=True, kw_only=True):
    """How to go on."""

    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=10_000_000)] = -1
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0


class TensorBody(Message, frozen=True, kw_only=True):
    """A tensor in JSON, dense or CSR."""

    data: list[float]
    dtype: str
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class Asample(Message, frozen=True, kw_only=True):
    """POST asample"""

    sampling_session_id: str
    seq_id: SeqId
    prompt: Prompt
    sampling_params: SamplingParamsBody
    num_samples: Annotated[int, Meta(ge=1, le=256)] = 1
    prompt_logprobs: bool | None = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TensorBody | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = False


class RetrieveFuture(Message, frozen=True, kw_only=True):
    """POST retrieve_future, cancel_future"""

    request_id: str
    allow_metadata_only: bool = False


class FuturesTarget(Message, frozen=True, kw_only=True):
    """The samples of one client of a sampling session."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: Annotated[int, Meta(ge=0, lt=2**63 // CLONE_SEQS)] = 0


class RetrieveFutures(Message, frozen=True, kw_only=True):
    """POST retrieve_futures"""

    target: FuturesTarget
    prev_cursor: SeqId = 0
    timeout: Annotated[float, Meta(ge=0)] | None = None
    retrieved_request_ids: list[str] = []


class JoinSamplingSession(Message, frozen=True, kw_only=True):
    """POST join_sampling_session"""

    sampling_session_id: str


class WeightsInfo(Message, frozen=True, kw_only=True):
    """POST weights_info"""

    tinker_path: str


class Ttl(Message, frozen=True, kw_only=True):
    """PUT .../ttl"""

    ttl_seconds: Annotated[int, Meta(ge=1, le=10**9)] | None = None


class Submitted(msgspec.Struct, frozen=True, kw_only=True):
    """A future to be fetched with retrieve_future."""

    request_id: str
    model_id: str | UnsetType = UNSET
    sample_sequence_ids: list[str] | UnsetType = UNSET


class TryAgain(msgspec.Struct, frozen=True, kw_only=True, tag="try_again"):
    """Not answered yet."""

    request_id: str
    queue_state: Literal["active", "paused_capacity", "paused_rate_limit"] = "active"


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A request that has its answer."""

    state: Literal["finished", "failed"]
    request_id: str
    response_payload_uncompressed_size: int | UnsetType = UNSET
    """About."""


class Completions(msgspec.Struct, frozen=True, kw_only=True):
    """What was answered since the last time that was asked."""

    completions: list[Completion]
    cursor: int


class FutureError(msgspec.Struct, frozen=True, kw_only=True):
    """It failed."""

    error: str
    category: Literal["user", "server", "unknown"]
