"""Losses of language modelling.

Shapes: N targets of the tokens of one micro-batch, of which a token may have several.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tinkerbell.losses.registry import LossResult, weights_of


def cross_entropy(
    logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float], lengths: Sequence[int]
) -> LossResult:
    """loss = - sum_t w_t log p_t, the negative log-likelihood of the targets.

    `logprobs` [N] are log p_t; `weights` [N] are w_t, default 1. With the probabilities that a teacher gives to several
    targets of a token as their weights it is the cross-entropy of the two, of these targets. Source: Goodfellow, Bengio
    & Courville 2016, Deep Learning, section 6.2.1.1.
    """
    weights = weights_of(logprobs, inputs)
    loss = -(weights * logprobs).sum()
    return loss, {"num_tokens": torch.tensor(float(len(logprobs))), "weight_sum": weights.sum()}
