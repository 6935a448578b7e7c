"""Keyword arguments of optim_step, sample and forward; meanings and bounds are those of `types.AdamParams`,
`types.SamplingParams` and `types.OutputSpec` if nothing else is said, and what is left out takes their defaults."""

from collections.abc import Sequence
from typing import TypedDict


class Adam(TypedDict, total=False):
    """Settings of one optimizer step."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip_norm: float


class Outputs(TypedDict, total=False):
    """What a forward answers besides the logprobs of the targets."""

    entropy: bool
    logsumexp: bool
    top_k: int
    logits: bool


class Sampling(TypedDict, total=False):
    """Settings of one sample request."""

    max_tokens: int
    num_samples: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: Sequence[str] | str
    stop_tokens: Sequence[int] | None
    prompt_logprobs: bool
    top_logprobs: int
    prompt_top_logprobs: int
    prompt_draws: int
    prompt_targets: Sequence[Sequence[int]] | None
    """[P, K], as in `wire.Sample`: at each position of the prompt tokens whose logprobs are asked for; -1 is none."""
