"""Policy-gradient losses on sampled tokens.

Shapes: N tokens of one micro-batch. `logprobs` in the inputs are those under the policy that sampled (log q_t),
the loss's first argument those under the policy being trained (log p_t); ratio r_t = p_t / q_t; advantage A_t.
All are sums; `weights` [N] multiply each token's term, default 1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tinkerbell.losses.registry import LossResult, weights_of


def importance_sampling(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> LossResult:
    """loss = - sum_t w_t r_t A_t, whose gradient is the off-policy policy gradient.

    Source: Degris, White & Sutton 2012, Off-Policy Actor-Critic, arXiv 1205.4839, equation 5.
    """
    ratio = torch.exp(logprobs - inputs["logprobs"])
    weights = weights_of(logprobs, inputs)
    loss = -(weights * ratio * inputs["advantages"]).sum()
    return loss, _policy_metrics(logprobs, inputs, ratio, weights)


def ppo(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> LossResult:
    """loss = - sum_t w_t min(r_t A_t, clip(r_t, low, high) A_t), low and high being absolute bounds of the ratio.

    Config `clip_low_threshold` = 1 - epsilon and `clip_high_threshold` = 1 + epsilon in the paper's letters.
    Source: Schulman et al. 2017, Proximal Policy Optimization, arXiv 1707.06347, equation 7.
    """
    ratio = torch.exp(logprobs - inputs["logprobs"])
    advantages, weights = inputs["advantages"], weights_of(logprobs, inputs)
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    plain = ratio * advantages
    clipped = ratio.clamp(low, high) * advantages
    loss = -(weights * torch.minimum(plain, clipped)).sum()
    metrics = _policy_metrics(logprobs, inputs, ratio, weights)
    metrics["clipped_sum"] = (weights * (clipped < plain)).sum()
    return loss, metrics


def _policy_metrics(
    logprobs: Tensor, inputs: Mapping[str, Tensor], ratio: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Weighted sums; divided by weight_sum they are means. kl_sum estimates KL(q || p) by log q_t - log p_t."""
    return {
        "num_tokens": torch.tensor(float(len(logprobs))),
        "weight_sum": weights.sum(),
        "ratio_sum": (weights * ratio).sum(),
        "kl_sum": (weights * (inputs["logprobs"] - logprobs)).sum(),
    }
