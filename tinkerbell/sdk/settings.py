"""Keyword arguments of optim_step and sample; meanings and bounds are those of `types.AdamParams` and
`types.SamplingParams`, and what is left out takes their defaults."""

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
