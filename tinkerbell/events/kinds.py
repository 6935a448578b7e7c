"""The vocabulary of the log: one frozen struct for each kind of event, closed as a tagged union.

An event is a fact in the past tense, never edited. Its struct holds the small facts (the `data` column, canonical
JSON, which an auditor queries with SQL); arrays travel beside it as the event's body (`Body` types below), weights
as named blobs. A new field needs a default; a new meaning needs a new `schema_version` and an upcaster in codec.py.
"""

from typing import Any, Literal

import msgspec

from tinkerbell.types import (
    AdamParams,
    AdapterId,
    Category,
    CheckpointId,
    CheckpointUse,
    Datum,
    DatumOutputs,
    LoraConfig,
    LossSpec,
    ModelInfo,
    OutputSpec,
    PromptScores,
    SampledSequence,
    SamplerId,
    SamplingParams,
    SessionId,
    TenantId,
)


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Something that happened."""


# ---- requests: what a tenant asked for. The position of a request is its future's id. ---------------------------


class Request(Event, frozen=True, kw_only=True):
    """Base of every request."""


class AddLoraRequested(Request, frozen=True, kw_only=True, tag="add_lora.requested"):
    """A new adapter, fresh from a seed or from a checkpoint."""

    base_model: str
    lora: LoraConfig
    seed: int
    name: str | None = None
    checkpoint: CheckpointId | None = None
    with_optimizer: bool = False
    user_metadata: dict[str, str] = {}
    base_hash: str = ""
    """ModelInfo.hash of the base model; empty: recorded by an older release."""
    num_parameters: int = 0
    """That it will have; 0: the executor had not said what decides it."""


class RemoveLoraRequested(Request, frozen=True, kw_only=True, tag="remove_lora.requested"):
    """The adapter leaves memory after what was asked before; its history and checkpoints stay."""


class ForwardRequested(Request, frozen=True, kw_only=True, tag="forward.requested"):
    """Loss and logprobs without gradients. Body: ForwardBackwardBody."""

    loss: LossSpec
    num_datums: int
    num_tokens: int
    num_targets: int = 1
    """Of each token."""
    chunk_tokens: int = 1024
    """It is cut into micro-batches of at most so many tokens, now and whenever it is executed again."""
    outputs: OutputSpec | None = None
    """What else to answer of each token's distribution."""


class ForwardBackwardRequested(Request, frozen=True, kw_only=True, tag="forward_backward.requested"):
    """Gradients are added to the adapter's. Body: ForwardBackwardBody."""

    loss: LossSpec
    num_datums: int
    num_tokens: int
    num_targets: int = 1
    chunk_tokens: int = 1024
    """As in ForwardRequested."""


class OptimStepRequested(Request, frozen=True, kw_only=True, tag="optim_step.requested"):
    """Apply and clear the accumulated gradient."""

    adam: AdamParams


class SampleRequested(Request, frozen=True, kw_only=True, tag="sample.requested"):
    """Continue a prompt with the weights the adapter has at this place in its stream. Body: SampleBody."""

    params: SamplingParams
    num_tokens: int
    """Prompt tokens."""
    prompt_logprobs_last: int | None = None
    """The caller only wants those of so many tokens at the prompt's end."""
    prompt_targets_sparse: bool = False
    """The caller wants what it asked for and no other cells."""


class SaveRequested(Request, frozen=True, kw_only=True, tag="save.requested"):
    """Keep the adapter as a checkpoint."""

    checkpoint: CheckpointId
    name: str | None = None
    use: CheckpointUse = "state"
    """Adam's moments are kept of a state only."""
    ttl_s: int | None = None
    """Seconds from its completion after which nobody can use it; None: for good."""
    user_metadata: dict[str, str] = {}
    sampler: SamplerId | None = None
    """The sampler that was made for it in the same breath."""
    replaces: tuple[CheckpointId, ...] = ()
    """Those of the same name, which are deleted once this one is there."""


class LoadRequested(Request, frozen=True, kw_only=True, tag="load.requested"):
    """Put a checkpoint in the adapter's place."""

    checkpoint: CheckpointId
    with_optimizer: bool = True


class SampleCancelled(Event, frozen=True, kw_only=True, tag="sample.cancelled"):
    """The caller wants no more of a sample. If it still waits, it fails; what runs already may be completed."""

    request: int
    """Its position."""


# ---- results: exactly one for each request ----------------------------------------------------------------------


class Result(Event, frozen=True, kw_only=True):
    """Base of every answer; `causation` of the row is the request's position."""

    batch: str | None = None
    """Id of the batch.planned that ran it last; None where nothing ran."""
    cost_us: int = 0
    """Accelerator microseconds charged to the tenant for this request, over all its chunks."""


class AddLoraCompleted(Result, frozen=True, kw_only=True, tag="add_lora.completed"):
    """The adapter is ready."""

    num_parameters: int
    step: int
    state_digest: str


class RemoveLoraCompleted(Result, frozen=True, kw_only=True, tag="remove_lora.completed"):
    """The adapter is gone from memory."""


class ForwardCompleted(Result, frozen=True, kw_only=True, tag="forward.completed"):
    """Body: LogprobsBody."""

    loss: float
    metrics: dict[str, float]
    num_tokens: int
    num_targets: int = 1
    """Of each token."""
    logprobs_digest: str | None = None
    """As in ForwardBackwardCompleted."""


class ForwardBackwardCompleted(Result, frozen=True, kw_only=True, tag="forward_backward.completed"):
    """Body: LogprobsBody."""

    loss: float
    """Sum over tokens."""
    metrics: dict[str, float]
    num_tokens: int
    num_targets: int = 1
    """Of each token."""
    logprobs_digest: str | None = None
    """sha256 (hex) over the datums' logprobs, each as its number of bytes (8, little-endian) and its float32 values;
    None: recorded by an older release. The body's own hash is over its stored form, which depends on a compressor."""


class OptimStepCompleted(Result, frozen=True, kw_only=True, tag="optim_step.completed"):
    """The adapter took a step."""

    step: int
    grad_norm: float
    """L2, before clipping."""
    state_digest: str
    """sha256 (hex) over weights, Adam moments and step count."""
    gradient_digest: str | None = None
    """sha256 (hex) over the accumulated gradient before clipping; None: recorded by an older release."""
    weights_digest: str | None = None
    """sha256 (hex) over the weights."""


class SampleCompleted(Result, frozen=True, kw_only=True, tag="sample.completed"):
    """Body: SamplesBody."""

    step: int
    """Optimizer steps behind the weights that sampled."""
    num_prompt_tokens: int
    num_sampled_tokens: int


class SaveCompleted(Result, frozen=True, kw_only=True, tag="save.completed"):
    """Blobs: weights, adapter_config; of a state optimizer as well."""

    checkpoint: CheckpointId
    name: str | None
    step: int
    lora: LoraConfig
    num_bytes: int
    state_digest: str
    use: CheckpointUse = "state"
    ttl_s: int | None = None
    user_metadata: dict[str, str] = {}
    replaces: tuple[CheckpointId, ...] = ()


class LoadCompleted(Result, frozen=True, kw_only=True, tag="load.completed"):
    """The adapter now is the checkpoint."""

    checkpoint: CheckpointId
    step: int
    state_digest: str


class Failed(Result, frozen=True, kw_only=True):
    """Base of every failure: nothing changed."""

    category: Category
    code: str
    """Problem slug."""
    message: str


class AddLoraFailed(Failed, frozen=True, kw_only=True, tag="add_lora.failed"):
    """The adapter was not made."""


class RemoveLoraFailed(Failed, frozen=True, kw_only=True, tag="remove_lora.failed"):
    """The adapter could not be removed."""


class ForwardFailed(Failed, frozen=True, kw_only=True, tag="forward.failed"):
    """No logprobs."""


class ForwardBackwardFailed(Failed, frozen=True, kw_only=True, tag="forward_backward.failed"):
    """No gradient was added."""


class OptimStepFailed(Failed, frozen=True, kw_only=True, tag="optim_step.failed"):
    """The weights are as they were; the accumulated gradient is cleared only where the message says so."""


class SampleFailed(Failed, frozen=True, kw_only=True, tag="sample.failed"):
    """No samples."""


class SaveFailed(Failed, frozen=True, kw_only=True, tag="save.failed"):
    """No checkpoint."""


class LoadFailed(Failed, frozen=True, kw_only=True, tag="load.failed"):
    """The adapter is as it was."""


class RequestFailed(Failed, frozen=True, kw_only=True, tag="request.failed"):
    """The server does not know what was asked: a newer release accepted it."""


# ---- what the server did of its own accord ----------------------------------------------------------------------


class PlannedUnit(msgspec.Struct, frozen=True, array_like=True):
    """One unit of a batch: datums [start, stop) of a forward or forward_backward, samples [start, stop) of a sample;
    0, 0 of what is not cut."""

    request: int
    start: int
    stop: int


class BatchPlanned(Event, frozen=True, kw_only=True, tag="batch.planned"):
    """The scheduler leader chose what runs next."""

    batch: str
    lane: Literal["train", "sample", "control"]
    environment: str
    """Digest of the environment.recorded it runs in."""
    units: list[PlannedUnit]
    estimated_us: int


class BatchRan(Event, frozen=True, kw_only=True, tag="batch.ran"):
    """It ran. The charges sum to busy_us: that is also the bill."""

    batch: str
    busy_us: int
    charges: list[tuple[int, int]]
    """(request, microseconds)."""


class BatchLost(Event, frozen=True, kw_only=True, tag="batch.lost"):
    """The executor died in it; its requests run again."""

    batch: str
    reason: str


class CheckpointWritten(Event, frozen=True, kw_only=True, tag="checkpoint.written"):
    """The server's own recovery point. Blobs: weights, adapter_config, optimizer."""

    checkpoint: CheckpointId
    after_seq: int
    """It holds the effect of the adapter's requests up to this one."""
    step: int
    lora: LoraConfig
    num_bytes: int
    state_digest: str


class EnvironmentRecorded(Event, frozen=True, kw_only=True, tag="environment.recorded"):
    """An executor came up in this environment."""

    digest: str
    """sha256 (hex) of the executor, the exactness, the model and the facts as canonical JSON."""
    executor: str
    exact: bool
    model: ModelInfo
    facts: dict[str, str]
    source: str | None = None
    """The model as the server was told it: a directory, a hub id, package:NAME."""
    options: dict[str, str] = {}
    """Settings of that kind of executor, as the server was told them."""


class LeaseGranted(Event, frozen=True, kw_only=True, tag="lease.granted"):
    """`epoch` is the fencing token: what carries an older one is refused."""

    resource: str
    holder: str
    epoch: int


class SessionStarted(Event, frozen=True, kw_only=True, tag="session.started"):
    """A program of the tenant's began to work; what it makes has ids that begin with the session's."""

    session: SessionId
    client: str
    """Name and version of the library that asked."""
    display_name: str | None = None
    tags: list[str] = []
    user_metadata: dict[str, Any] = {}


class SessionHeard(Event, frozen=True, kw_only=True, tag="session.heard"):
    """Its program still runs. Written now and then, however often the program says so."""

    session: SessionId


class SessionEnded(Event, frozen=True, kw_only=True, tag="session.ended"):
    """It said so, or was not heard of for too long. What it saved stays."""

    session: SessionId
    reason: str
    """As the program said it; `expired`: it fell silent."""
    detail: str | None = None


class SamplerCreated(Event, frozen=True, kw_only=True, tag="sampler.created"):
    """Weights to sample from that nothing changes: a checkpoint's, or the base model's."""

    sampler: SamplerId
    session: SessionId
    checkpoint: CheckpointId | None = None
    """None: the base model."""


class SamplerJoined(Event, frozen=True, kw_only=True, tag="sampler.joined"):
    """Another client samples with it. Its position in the log is the client's number."""

    sampler: SamplerId


class CheckpointChanged(Event, frozen=True, kw_only=True, tag="checkpoint.changed"):
    """How long a checkpoint is kept and who may know of it; its contents never change."""

    checkpoint: CheckpointId
    expires_us: int | None
    """Microseconds since 1970 after which nobody can use it; None: for good."""
    published: bool
    deleted: bool = False


class CheckpointCopied(Event, frozen=True, kw_only=True, tag="checkpoint.copied"):
    """A checkpoint is there once more, in a run of its own that nobody can train. Blobs: those of the source.
    They stay for as long as one of the two is there."""

    checkpoint: CheckpointId
    source: CheckpointId
    name: str
    use: CheckpointUse
    base_model: str
    seed: int
    """Of the adapter that the source was saved of."""
    step: int
    lora: LoraConfig
    num_bytes: int
    state_digest: str
    ttl_s: int | None = None
    """Seconds from now after which nobody can use the copy; None: for good, whatever holds for the source."""
    user_metadata: dict[str, str] = {}
    base_hash: str = ""
    """Of the adapter that the source was saved of; empty where it has none."""


class KeyCreated(Event, frozen=True, kw_only=True, tag="key.created"):
    """An API key; only its hash is kept."""

    key_id: str
    key_hash: str
    """sha256 (hex) of the secret, which has 256 random bits."""
    admin: bool = False
    note: str = ""


class KeyRevoked(Event, frozen=True, kw_only=True, tag="key.revoked"):
    """The key opens nothing any more."""

    key_id: str


class TenantConfigured(Event, frozen=True, kw_only=True, tag="tenant.configured"):
    """Share and limits of a tenant; None keeps the server's default."""

    weight: float = 1.0
    max_pending_requests: int | None = None
    max_pending_tokens: int | None = None
    max_adapters: int | None = None
    max_adapter_bytes: int | None = None
    max_sessions: int | None = None
    max_samplers: int | None = None
    max_checkpoints: int | None = None
    max_stored_bytes: int | None = None


class LogSealed(Event, frozen=True, kw_only=True, tag="log.sealed"):
    """One hash over the heads of all streams (events/seals.py). Who keeps it elsewhere can tell later whether anything
    before it was written anew."""

    position: int
    """It covers the events up to this one."""
    root: str
    """Merkle root (hex) over (stream, version, hash) of every stream's last event."""
    num_streams: int


class TenantErased(Event, frozen=True, kw_only=True, tag="tenant.erased"):
    """Bodies and blobs of all the tenant's events before this one are gone, and the keys they were encrypted with. Its
    adapters are removed; what it was asked and what came of it in numbers stays."""

    adapters: list[AdapterId]
    """Those that were alive."""
    checkpoints: list[CheckpointId]
    """All it ever had, the server's recovery points too: each was derived from its data."""
    data_keys: list[str]
    """Ids (hex) of the keys that were destroyed."""
    num_bodies: int
    num_blobs: int
    num_bytes: int
    """As stored, of bodies and blobs."""


class BulkCompacted(Event, frozen=True, kw_only=True, tag="bulk.compacted"):
    """Bodies and blobs of these events of the tenant are gone; their hashes stay."""

    before_us: int
    """They are older than this, microseconds since 1970."""
    positions: list[int]
    num_bodies: int
    num_blobs: int
    num_bytes: int
    """As stored, of bodies and blobs."""
    checkpoints: list[CheckpointId] = []
    """Where they went because nothing rests on them any more, whatever their age: recovery points of the server that
    newer ones replaced, or whose adapter was removed."""


AnyRequest = (
    AddLoraRequested
    | RemoveLoraRequested
    | ForwardRequested
    | ForwardBackwardRequested
    | OptimStepRequested
    | SampleRequested
    | SaveRequested
    | LoadRequested
)
AnyFailed = (
    AddLoraFailed
    | RemoveLoraFailed
    | ForwardFailed
    | ForwardBackwardFailed
    | OptimStepFailed
    | SampleFailed
    | SaveFailed
    | LoadFailed
    | RequestFailed
)
AnyResult = (
    AddLoraCompleted
    | RemoveLoraCompleted
    | ForwardCompleted
    | ForwardBackwardCompleted
    | OptimStepCompleted
    | SampleCompleted
    | SaveCompleted
    | LoadCompleted
    | AnyFailed
)
AnyCheckpoint = SaveCompleted | CheckpointWritten | CheckpointCopied
"""Events that make a checkpoint and name its blobs."""
AnyEvent = (
    AnyRequest
    | SampleCancelled
    | AnyResult
    | BatchPlanned
    | BatchRan
    | BatchLost
    | CheckpointWritten
    | EnvironmentRecorded
    | LeaseGranted
    | SessionStarted
    | SessionHeard
    | SessionEnded
    | SamplerCreated
    | SamplerJoined
    | CheckpointChanged
    | CheckpointCopied
    | KeyCreated
    | KeyRevoked
    | TenantConfigured
    | LogSealed
    | TenantErased
    | BulkCompacted
)


class Unreadable(Event, frozen=True, kw_only=True, tag="unreadable"):
    """Stands for an event of the log that this release cannot read: an older one wrote what is not within its limits,
    a newer one knows more, or the row was damaged. It is never written."""

    type_: str
    """Of the event."""
    why: str
    num_tokens: int = 0
    """That a request brought, where that much can be read."""


AnyRead = AnyEvent | Unreadable
"""What reading the log gives."""

FAILED: dict[str, type[AnyFailed]] = {
    cls.__struct_config__.tag.removesuffix(".failed"): cls  # type: ignore[union-attr]
    for cls in (
        AddLoraFailed,
        RemoveLoraFailed,
        ForwardFailed,
        ForwardBackwardFailed,
        OptimStepFailed,
        SampleFailed,
        SaveFailed,
        LoadFailed,
    )
}
"""Kind of a request -> its failure; of any other RequestFailed."""

SAMPLE_KINDS = frozenset({"sample"})
"""Kinds outside an adapter's sequence: they read one version of it and may be answered out of order."""


def type_of(event: Event | type[Event]) -> str:
    """`forward_backward.requested`."""
    if isinstance(event, Unreadable):
        return event.type_
    tag = event.__struct_config__.tag
    assert isinstance(tag, str)
    return tag


def kind_of(event: Event | type[Event]) -> str:
    """`forward_backward`: what is before the last dot of the type."""
    return type_of(event).rpartition(".")[0]


def facts_of(event: Event) -> dict[str, Any]:
    """What an event says, by field; of one that cannot be read, why."""
    if isinstance(event, Unreadable):
        return {"unreadable": event.why}
    facts: dict[str, Any] = msgspec.to_builtins(event)
    del facts["type"]
    return facts


def answers(event: Event, kind: str) -> bool:
    """Whether a result can be that of a request of this kind."""
    return kind_of(event) == kind or (isinstance(event, RequestFailed) and kind not in FAILED)


def is_request(event: Event) -> bool:
    """Whether somebody asked for something, readably or not."""
    return isinstance(event, Request) or (isinstance(event, Unreadable) and event.type_.endswith(".requested"))


def is_result(event: Event) -> bool:
    """Whether it answers a request, readably or not."""
    return isinstance(event, Result) or (
        isinstance(event, Unreadable) and event.type_.endswith((".completed", ".failed"))
    )


# ---- bodies -----------------------------------------------------------------------------------------------------


class ForwardBackwardBody(msgspec.Struct, frozen=True, array_like=True):
    """The data of a forward or forward_backward."""

    data: list[Datum]


class SampleBody(msgspec.Struct, frozen=True, array_like=True):
    """The prompt, [P] int32, and [P, K] int32 tokens whose logprobs are asked for at its positions (-1: none)."""

    prompt: bytes
    prompt_targets: bytes | None = None


class LogprobsBody(msgspec.Struct, frozen=True, array_like=True):
    """For each datum [N, K] float32 nats."""

    logprobs: list[bytes]


class OutputsBody(LogprobsBody, frozen=True, array_like=True):
    """And what else was asked for of each datum; empty where nothing was."""

    outputs: list[DatumOutputs] = []


class SamplesBody(msgspec.Struct, frozen=True, array_like=True):
    """Continuations, and [P - 1] float32 logprobs of the prompt and what else of it was asked for."""

    sequences: list[SampledSequence]
    prompt_logprobs: bytes | None
    prompt_scores: PromptScores | None = None


Body = ForwardBackwardBody | SampleBody | LogprobsBody | OutputsBody | SamplesBody

BODY_OF: dict[str, type[Body]] = {
    "forward.requested": ForwardBackwardBody,
    "forward_backward.requested": ForwardBackwardBody,
    "sample.requested": SampleBody,
    "forward.completed": OutputsBody,
    "forward_backward.completed": LogprobsBody,
    "sample.completed": SamplesBody,
}
"""Event type -> type of its body; a type that is missing has none."""


BodyCodec = Literal["zstd", "msgpack", "zstd+aes256gcm", "msgpack+aes256gcm"]
"""How a body is stored: MessagePack, compressed or not, encrypted or not."""

# ---- the envelope -----------------------------------------------------------------------------------------------


class NewEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event to append."""

    event: AnyEvent
    tenant: TenantId
    stream: str
    """`adapter/<id>`, `tenant/<id>` or `system/<what>`: the unit of versions and of the hash chain."""
    adapter: AdapterId | None = None
    body: Body | None = None
    blobs: dict[str, bytes] = {}
    """Name -> bytes, written durably to the blob store before the event."""
    shared: dict[str, str] = {}
    """Name -> hash (hex) of blobs that an earlier event brought; the event names them as well. Gone where one was
    removed."""
    causation: int | None = None
    """Position of the request this answers."""
    correlation: str | None = None
    """Trace id of the HTTP request."""
    actor: str | None = None
    """Id of the API key that asked, or the scheduler's holder name."""
    idempotency_key: str | None = None
    request_hash: bytes | None = None
    """sha256 of the request as the caller meant it; needed with an idempotency key."""
    expected_seq: int | None = None
    """Refuse with SequenceConflict unless this is the seq the request would get."""
    session: SessionId | None = None
    """Refuse with SessionOver where this session of the tenant's has ended when this commits, NotFound where there is
    none."""
    fence: tuple[str, int] | None = None
    """(resource, epoch) of a lease that must still hold when this commits."""


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """An event of the log."""

    position: int
    """1, 2, 3, ... without gaps, in commit order."""
    stream: str
    stream_version: int
    """0, 1, 2, ... without gaps within the stream."""
    at_us: int
    """Microseconds since 1970, UTC."""
    tenant: TenantId
    adapter: AdapterId | None
    seq: int | None
    """Of a request: its place among the adapter's requests, 0, 1, 2, ...; None for samples and for what is no
    request. Of a result: None."""
    event: AnyRead
    body: bytes | None
    """The body as stored when it is inline (see codec.decode_body); None where there is none or it is a blob."""
    blobs: dict[str, str]
    """Name -> hash (hex) of the blobs; a body too large to be inline is the blob named `body`."""
    causation: int | None
    correlation: str | None
    actor: str | None
    hash: str
    """Hex; the next event of the stream has it as its prev_hash."""
    body_codec: BodyCodec | None = None
    """How the body is stored, inline or as a blob; None where there is none."""
    body_hash: str | None = None
    """sha256 (hex) of the body's stored bytes."""
