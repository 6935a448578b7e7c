"""Rows of the projections, as the queries give them. Times are microseconds since 1970, UTC."""

from typing import Any, Literal, NamedTuple

import msgspec

from tinkerbell.types import CheckpointUse, LoraConfig


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all rows."""


class FutureRow(Row, frozen=True, kw_only=True):
    """A request and what became of it."""

    id: int
    """Position of the request in the log."""
    tenant: str
    adapter: str | None
    seq: int | None
    kind: str
    state: Literal["pending", "completed", "failed"]
    num_tokens: int
    """Tokens the request brought."""
    result_position: int | None
    """Position of its answer."""
    cost_us: int | None
    created_us: int
    done_us: int | None


class AnsweredRow(Row, frozen=True, kw_only=True):
    """A request that has its answer."""

    id: int
    idempotency_key: str
    result_position: int
    num_bytes: int | None
    """Of the answer's body before compression; None where it has none."""
    state: Literal["completed", "failed"]


class AdapterRow(Row, frozen=True, kw_only=True):
    """An adapter as the answered requests left it."""

    id: str
    tenant: str
    name: str | None
    base_model: str
    base_hash: str | None
    """Names its weights; None: made by an older release (see BaseModelQueries)."""
    lora: LoraConfig
    seed: int
    checkpoint: str | None
    """Checkpoint it started from."""
    with_optimizer: bool
    state: Literal["pending", "ready", "failed", "removed"]
    num_parameters: int | None
    step: int
    """Optimizer steps taken."""
    next_seq: int
    """seq of its next request."""
    done_seq: int
    """Every request up to this one is answered; -1: none."""
    last_loss: float | None
    """Loss per token of its newest forward_backward."""
    state_digest: str | None
    created_us: int
    user_metadata: dict[str, str]


class CheckpointRow(Row, frozen=True, kw_only=True):
    """A saved adapter."""

    id: str
    tenant: str
    adapter: str
    kind: Literal["save", "recovery"]
    name: str | None
    after_seq: int
    """It holds the effect of the adapter's requests up to this one."""
    step: int
    lora: LoraConfig
    num_bytes: int
    state_digest: str
    blobs: dict[str, str]
    """Name (weights, adapter_config, optimizer) -> hash (hex)."""
    created_us: int
    use: CheckpointUse
    user_metadata: dict[str, str]
    expires_us: int | None
    """Nobody can use it from then on; None: never."""
    published: bool
    deleted: bool

    def is_usable(self, now_us: int) -> bool:
        """Whether somebody may still load it or sample from it."""
        return not self.deleted and (self.expires_us is None or now_us < self.expires_us)


class DisposableRow(Row, frozen=True, kw_only=True):
    """A checkpoint that goes by itself one day, and is still there."""

    id: str
    tenant: str
    adapter: str
    position: int
    blobs: dict[str, str]
    """Name -> hash (hex)."""


class RecoveryPointRow(DisposableRow, frozen=True, kw_only=True):
    """One that the server wrote of its own accord."""

    adapter_state: Literal["pending", "ready", "failed", "removed"]
    after_seq: int
    """It holds the effect of the adapter's requests up to this one."""


class SamplerWeightsRow(DisposableRow, frozen=True, kw_only=True):
    """One that was saved without a name, for one sampler."""

    created_us: int
    expires_us: int | None
    sampler: str
    sampler_state: Literal["pending", "ready", "failed", "removed"] | None
    """Of the adapter that holds the sampler's weights; None: nobody has sampled yet."""
    ended_us: int | None
    """When the sampler's session ended."""


class SessionRow(Row, frozen=True, kw_only=True):
    """A program of the tenant's."""

    id: str
    tenant: str
    client: str
    display_name: str | None
    tags: list[str]
    user_metadata: dict[str, Any]
    created_us: int
    heard_us: int
    """When the program last said that it runs, to a fraction of `session_expiry_s`."""
    ended_us: int | None


class SamplerRow(Row, frozen=True, kw_only=True):
    """Weights to sample from."""

    id: str
    tenant: str
    session: str
    checkpoint: str | None
    """None: the base model."""
    created_us: int


class KeyRow(Row, frozen=True, kw_only=True):
    """An API key."""

    key_id: str
    tenant: str
    key_hash: str
    """sha256 (hex) of the secret."""
    admin: bool
    note: str
    created_us: int
    revoked_us: int | None


class TenantRow(Row, frozen=True, kw_only=True):
    """Share and limits of a tenant; None is the server's default."""

    tenant: str
    weight: float = 1.0
    max_pending_requests: int | None = None
    max_pending_tokens: int | None = None
    max_adapters: int | None = None
    max_adapter_bytes: int | None = None
    max_sessions: int | None = None
    max_samplers: int | None = None
    max_checkpoints: int | None = None
    max_stored_bytes: int | None = None


class HourOfUsage(Row, frozen=True, kw_only=True):
    """What was answered of one adapter and kind within an hour."""

    hour_us: int
    """Its start."""
    adapter: str
    """Empty: the base model."""
    kind: str
    num_requests: int
    tokens_in: int
    tokens_out: int
    cost_us: int


class UsageRow(Row, frozen=True, kw_only=True):
    """What was answered and what it cost, by adapter and kind of request."""

    tenant: str
    adapter: str | None
    """None: the base model."""
    kind: str
    num_requests: int
    tokens_in: int
    tokens_out: int
    cost_us: int


class RunPoint(Row, frozen=True, kw_only=True):
    """One optimizer step of an adapter."""

    step: int
    at_us: int
    learning_rate: float
    grad_norm: float
    loss_sum: float
    """Of the forward_backward requests whose gradient it applied, over their tokens."""
    num_tokens: int
    state_digest: str


class RunCounts(NamedTuple):
    """Totals of an adapter's requests."""

    num_requests: int
    num_failed: int
    num_tokens: int
    cost_us: int
