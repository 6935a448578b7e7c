"""The nouns every package shares: ids, data, LoRA and optimizer settings, sampling settings, losses.

Imports nothing of ours. Every array that can be long is little-endian bytes in C order (`int32` for token ids,
`float32` for numbers), so that it is stored, hashed and sent between processes without a copy per element;
JSON lists exist only in `wire.py`.
"""

import struct
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

TenantId = str
AdapterId = str
CheckpointId = str
SessionId = str
SamplerId = str
FutureId = int
"""Position of the request's event in the log."""

Category = Literal["user", "server"]
"""Who can mend a failure: the caller, or whoever runs the server."""

CheckpointUse = Literal["state", "sampler", "external"]
"""What a checkpoint was made for: to train on, to sample from, to be taken away."""

SYSTEM_TENANT: TenantId = "system"
"""Owner of events that belong to no user: leases, batches, environments."""

LOCAL_TENANT: TenantId = "local"
"""The one tenant of a server without keys (loopback only)."""


def is_sampler(adapter: AdapterId) -> bool:
    """Whether an adapter is a frozen copy that a sampler reads: its id is the sampler's."""
    return ":sample:" in adapter


def session_of(adapter: AdapterId | None) -> SessionId | None:
    """The session that an adapter's id begins with; None for an adapter of `/v1`, and for none."""
    session, colon, _ = (adapter or "").partition(":")
    return session if colon else None


Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$(?!\n)")]
"""A name a person gives: 1 to 64 letters, digits, dots, dashes, underscores."""

TARGET_PRESETS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "unembed": ("lm_head",),
}
"""Short words for target modules; any other word is the last part of a module's name (`q_proj`)."""


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape of one adapter: W + (alpha / rank) B A on every target (Hu et al. 2021, arXiv 2106.09685)."""

    rank: Annotated[int, Meta(ge=1, le=1024)] = 16
    alpha: Annotated[float, Meta(gt=0, le=1e6)] = 32.0
    """Numerator of the scale alpha / rank."""
    targets: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=64)], ...], Meta(min_length=1, max_length=32)
    ] = ("all-linear",)
    """Presets of TARGET_PRESETS or last parts of module names."""


class AdamParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) for one step of one adapter."""

    learning_rate: Annotated[float, Meta(ge=0, le=10)] = 1e-4
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Meta(ge=1e-20, le=1)] = 1e-8
    weight_decay: Annotated[float, Meta(ge=0, le=10)] = 0.0
    """Decoupled: weights are multiplied by 1 - learning_rate * weight_decay."""
    grad_clip_norm: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    """Largest L2 norm of this adapter's whole gradient; 0 means no clipping."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to continue one prompt."""

    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    num_samples: Annotated[int, Meta(ge=1, le=256)] = 1
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    """0 is greedy."""
    top_k: Annotated[int, Meta(ge=-1, le=10_000_000)] = -1
    """Keep the k likeliest tokens; -1 or 0 keeps all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches top_p."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """Same seed, weights and settings give the same samples; absent: derived from the request's place in the log."""
    stop: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...], Meta(max_length=16)] = ()
    """Text that ends a sample; it stays in the sample, once."""
    stop_tokens: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=64)] | None = None
    """Tokens that end a sample, kept once; absent: the model's end-of-sequence tokens; empty: none."""
    prompt_logprobs: bool = False
    """Also return the logprob of every prompt token but the first."""
    top_logprobs: Annotated[int, Meta(ge=0, le=64)] = 0
    """Also return the k likeliest tokens at every sampled token, with their logprobs, of the model's own distribution
    (temperature 1, nothing cut off); of equal ones the lower id comes first."""
    prompt_top_logprobs: Annotated[int, Meta(ge=0, le=64)] = 0
    """The same at every prompt token but the first."""
    prompt_draws: Annotated[int, Meta(ge=0, le=64)] = 0
    """Also draw so many tokens at every prompt position but the first, each by itself from the distribution there at
    `temperature` (top_k and top_p cut nothing off), and return them with their logprobs at temperature 1."""

    def num_bytes(self, num_tokens: int, num_targets: int = 0) -> int:
        """Bytes, at most, of what is answered beside tokens and their logprobs, of a prompt of so many tokens with so
        many targets at each of its positions."""
        sampled = self.num_samples * self.max_tokens * self.top_logprobs
        of_prompt = (num_tokens - 1) * (self.prompt_top_logprobs + self.prompt_draws)
        return 8 * (sampled + of_prompt) + 4 * num_tokens * num_targets


class LossSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A loss by name with its settings."""

    name: Annotated[str, Meta(min_length=1, max_length=64)] = "cross_entropy"
    config: dict[str, float] = {}


class OutputSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a forward answers of each token's distribution, besides the logprob of its target."""

    entropy: bool = False
    """-sum p log p over the vocabulary, in nats."""
    logsumexp: bool = False
    """log sum exp of the logits: a token's logprob is its logit less this."""
    top_k: Annotated[int, Meta(ge=0, le=64)] = 0
    """The k likeliest tokens with their logprobs; of equal ones the lower id comes first."""
    logits: bool = False
    """All of them."""

    def num_bytes(self, num_tokens: int, vocab_size: int) -> int:
        """Bytes of the arrays of `DatumOutputs` for so many tokens."""
        numbers = self.entropy + self.logsumexp + 2 * self.top_k + self.logits * vocab_size
        return 4 * num_tokens * numbers


class LossSignature(msgspec.Struct, frozen=True, kw_only=True):
    """What a built-in loss reads, so that a request can be checked without importing torch."""

    required: tuple[str, ...] = ()
    """Names of the [N] float arrays every datum must carry in `loss_inputs`."""
    optional: dict[str, float] = msgspec.field(default_factory=lambda: {"weights": 1.0})
    """Names of others, with the number that stands for each one of a datum that does not carry it."""
    masked_by: tuple[str, ...] = ("weights",)
    """Names of inputs whose 0 takes a token out. What it then has for `logprobs` need not be any policy's."""
    config: dict[str, float] = {}
    """Settings with their defaults."""
    several_targets: bool = False
    """Whether a token may have more than one target."""

    def input_of(self, datum: "Datum", name: str) -> bytes:
        """[N, K] float32: what the datum carries under this name, or what stands for it."""
        given = datum.loss_inputs.get(name)
        if given is not None:
            return given
        return struct.pack("<f", self.optional[name]) * (len(datum.targets) // 4)


BUILTIN_LOSSES: dict[str, LossSignature] = {
    "cross_entropy": LossSignature(several_targets=True),
    "importance_sampling": LossSignature(required=("logprobs", "advantages"), masked_by=("weights", "advantages")),
    "ppo": LossSignature(
        required=("logprobs", "advantages"),
        masked_by=("weights", "advantages"),
        config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    ),
    "cispo": LossSignature(
        required=("logprobs", "advantages"),
        masked_by=("weights", "advantages"),
        config={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    ),
    "dro": LossSignature(required=("logprobs", "advantages"), config={"beta": 0.05}),
    "gspo": LossSignature(
        required=("logprobs", "advantages", "sequence_ratio_mask"),
        masked_by=("weights", "sequence_ratio_mask"),
        config={"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},
    ),
}
"""Signatures of the losses in `tinkerbell/losses`; a test keeps the two in step. Formulas are there."""

MAX_TARGETS = 1024
"""Most targets of one token."""


class Datum(msgspec.Struct, frozen=True, array_like=True):
    """One sequence to train on. Targets are given, never shifted by the server: logprob t is that of
    `targets[t]` after `tokens[0..t]`.

    Example: for the text [5, 6, 7], tokens = [5, 6], targets = [6, 7].
    """

    tokens: bytes
    """[N] int32 model input."""
    targets: bytes
    """[N, K] int32, K targets of each position; K is 1 but for losses that take several, and the same for all data of
    a request."""
    loss_inputs: dict[str, bytes]
    """Name -> [N, K] float32, as the loss's signature says (weights, logprobs, advantages, ...)."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.tokens) // 4


class DatumOutputs(msgspec.Struct, frozen=True, array_like=True):
    """What an OutputSpec asked for, of one datum; None where it was not asked for. V: the model's vocabulary."""

    entropy: bytes | None = None
    """[N] float32 nats."""
    logsumexp: bytes | None = None
    """[N] float32."""
    top_tokens: bytes | None = None
    """[N, k] int32, likeliest first."""
    top_logprobs: bytes | None = None
    """[N, k] float32 nats."""
    logits: bytes | None = None
    """[N, V] float32."""


class SampledSequence(msgspec.Struct, frozen=True, array_like=True):
    """One continuation of a prompt."""

    tokens: bytes
    """[M] int32, the stop token included exactly once if one was met."""
    logprobs: bytes
    """[M] float32 nats, of the model's own distribution (temperature 1, nothing cut off)."""
    stop_reason: Literal["stop", "length"]
    top_tokens: bytes | None = None
    """[M, k] int32, likeliest first, where they were asked for."""
    top_logprobs: bytes | None = None
    """[M, k] float32 nats, of the same distribution."""


class PromptScores(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was asked for of a prompt of P tokens besides their logprobs; None where it was not asked for. All of it is
    of the model's own distribution at a position, given the tokens before it."""

    top_tokens: bytes | None = None
    """[P - 1, k] int32 at positions 1.., likeliest first."""
    top_logprobs: bytes | None = None
    """[P - 1, k] float32 nats."""
    target_logprobs: bytes | None = None
    """[P, K] float32 nats of the targets; NaN at position 0 and where there was none."""
    drawn_tokens: bytes | None = None
    """[P - 1, d] int32 drawn at positions 1.."""
    drawn_logprobs: bytes | None = None
    """[P - 1, d] float32 nats."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller must know of the base model to send valid requests."""

    name: str
    vocab_size: int
    max_length: int
    """Longest sequence in tokens, prompt and continuation together."""
    targets: tuple[str, ...]
    """Module names a LoRA can sit on."""
    eos_tokens: tuple[int, ...]
    tokenizer: str
    """What `AutoTokenizer.from_pretrained` takes to get the tokenizer; a directory or a hub id; empty for the fake."""
    hash: str = ""
    """Names the weights and how they are used, wherever the model lies and whatever it is called. Empty: recorded by an
    older release, or by an executor that does not say."""
    parameters_per_rank: dict[str, int] = {}
    """Target -> parameters that a LoRA of rank 1 has on all layers of that name; empty: it does not go by these."""

    def room(self, num_prompt_tokens: int) -> int:
        """How many tokens may follow a prompt of so many: the rest of the longest sequence, and one where that is full,
        since who scores a sequence that fills it samples a token as well. 0: the prompt is too long."""
        return 0 if num_prompt_tokens > self.max_length else max(1, self.max_length - num_prompt_tokens)
