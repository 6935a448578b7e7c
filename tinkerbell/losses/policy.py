"""Policy-gradient losses on sampled tokens.

Shapes: N tokens of one micro-batch. `logprobs` in the inputs are those under the policy that sampled (log q_t),
the loss's first argument those under the policy being trained (log p_t); ratio r_t = p_t / q_t; advantage A_t.
All are sums; `weights` [N] multiply each token's term, default 1. A token that is masked may have any logprob in the
inputs.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tinkerbell.losses.registry import LossResult, weights_of


def importance_sampling(
    logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float], lengths: Sequence[int]
) -> LossResult:
    """loss = - sum_t w_t r_t A_t, whose gradient is the off-policy policy gradient.

    Source: Degris, White & Sutton 2012, Off-Policy Actor-Critic, arXiv 1205.4839, equation 5.
    """
    ratio = torch.exp(logprobs - inputs["logprobs"])
    weights = weights_of(logprobs, inputs)
    loss = -(weights * ratio * inputs["advantages"]).sum()
    return loss, _policy_metrics(logprobs, inputs, ratio, weights)


def ppo(
    logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float], lengths: Sequence[int]
) -> LossResult:
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


def cispo(
    logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float], lengths: Sequence[int]
) -> LossResult:
    """loss = - sum_t w_t c_t A_t log p_t, c_t = clip(r_t, low, high) being a constant: no token loses its gradient.

    Source: MiniMax 2025, MiniMax-M1, arXiv 2506.13585, equations 4 and 5.
    """
    ratio = torch.exp(logprobs - inputs["logprobs"])
    advantages, weights = inputs["advantages"], weights_of(logprobs, inputs)
    clipped = ratio.detach().clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    loss = -(weights * clipped * advantages * logprobs).sum()
    metrics = _policy_metrics(logprobs, inputs, ratio, weights)
    metrics["clipped_sum"] = (weights * (clipped != ratio.detach())).sum()
    return loss, metrics


def dro(
    logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float], lengths: Sequence[int]
) -> LossResult:
    """loss = - sum_t w_t (A_t log p_t - beta / 2 (log p_t - log q_t)^2), the policy's part of direct reward
    optimisation with the value already taken off the reward.

    Source: Richemond et al. 2024, Offline Regularised Reinforcement Learning for LLMs, arXiv 2405.19107, section 3.
    """
    advantages, weights = inputs["advantages"], weights_of(logprobs, inputs)
    away = logprobs - inputs["logprobs"]
    loss = -(weights * (advantages * logprobs - config["beta"] / 2 * away**2)).sum()
    return loss, _policy_metrics(logprobs, inputs, torch.exp(away), weights)


def gspo(
    logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float], lengths: Sequence[int]
) -> LossResult:
    """loss = - sum_t w_t m_t min(s A_t, clip(s, low, high) A_t), s being one ratio for a whole sequence: the geometric
    mean of r_t over its tokens with m_t.

    `sequence_ratio_mask` [N] is m_t, 1 for a token of the answer and 0 for others; a sequence without any adds nothing.
    The paper has one term for a sequence: that is w_t = 1 / sum_t m_t. `weights` do not enter s.
    Source: Zheng et al. 2025, Group Sequence Policy Optimization, arXiv 2507.18071, equations 5 and 7.
    """
    mask = inputs["sequence_ratio_mask"]
    away = torch.split(mask * (logprobs - inputs["logprobs"]), list(lengths))
    counts = [part.sum() for part in torch.split(mask, list(lengths))]
    means = [part.sum() / count if count > 0 else part.sum() * 0 for part, count in zip(away, counts, strict=True)]
    ratio = torch.cat([mean.exp().expand(length) for mean, length in zip(means, lengths, strict=True)])
    advantages, weights = inputs["advantages"], mask * weights_of(logprobs, inputs)
    plain = ratio * advantages
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"]) * advantages
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
