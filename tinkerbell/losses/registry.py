"""Losses by name, and how one is called.

A loss sees the logprobs of one micro-batch and nothing of the model: it returns a scalar, and autograd on the
small leaf `logprobs` gives dLoss/dlogprobs, a vector the executor multiplies into the model's backward pass.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinkerbell.errors import InvalidRequest
from tinkerbell.types import BUILTIN_LOSSES, LossSignature, LossSpec

LossResult = tuple[Tensor, dict[str, Tensor]]
"""(scalar loss, scalar metrics). Both are sums over tokens, so that micro-batches add."""

LossFunction = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, float], Sequence[int]], LossResult]
"""(logprobs [N] that require a gradient, inputs name -> [N], config, tokens of each sequence) -> LossResult."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss with its settings filled in."""

    function: LossFunction
    config: Mapping[str, float]
    signature: LossSignature


@dataclass(frozen=True, slots=True)
class LossValue:
    """What one micro-batch's loss came to."""

    loss: float
    metrics: dict[str, float]
    gradient: Tensor
    """[N] dLoss/dlogprobs."""


def functions() -> dict[str, LossFunction]:
    """Every built-in loss by name."""
    from tinkerbell.losses import language, policy

    return {
        "cross_entropy": language.cross_entropy,
        "importance_sampling": policy.importance_sampling,
        "ppo": policy.ppo,
        "cispo": policy.cispo,
        "dro": policy.dro,
        "gspo": policy.gspo,
    }


def resolve(spec: LossSpec) -> Loss:
    """The loss `spec` names. Raises InvalidRequest for an unknown name or setting."""
    signature = BUILTIN_LOSSES.get(spec.name)
    if signature is None:
        raise InvalidRequest(f"loss `{spec.name}` is not one of {', '.join(BUILTIN_LOSSES)}")
    unknown = sorted(set(spec.config) - set(signature.config))
    if unknown:
        raise InvalidRequest(f"loss `{spec.name}` has no setting `{unknown[0]}`")
    for name, value in spec.config.items():
        if not math.isfinite(value):
            raise InvalidRequest(f"loss `{spec.name}`: setting `{name}` is not a finite number")
    return Loss(
        function=functions()[spec.name],
        config={**signature.config, **spec.config},
        signature=signature,
    )


def evaluate(loss: Loss, logprobs: Tensor, inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> LossValue:
    """Loss, metrics and dLoss/dlogprobs for logprobs [N] of sequences of these lengths, which sum to N.

    Computed in fp64: the vectors are short, and a sum of thousands of terms keeps its digits.
    """
    leaf = logprobs.detach().double().requires_grad_(True)
    wide = {name: array.double() for name, array in inputs.items()}
    if "logprobs" in wide:
        wide["logprobs"] = _without_fillers(loss.signature, leaf.detach(), wide)
    with torch.enable_grad():
        value, metrics = loss.function(leaf, wide, loss.config, lengths)
    (gradient,) = torch.autograd.grad(value, leaf)
    return LossValue(
        loss=value.item(),
        metrics={name: metric.item() for name, metric in metrics.items()},
        gradient=gradient.to(logprobs.dtype),
    )


def _without_fillers(signature: LossSignature, logprobs: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """[N] log q_t, 0 in the place of what no policy gave a masked token: its ratio would be infinite, and zero times
    that is no number."""
    policy = inputs["logprobs"]
    masked = torch.zeros_like(policy, dtype=torch.bool)
    for name in signature.masked_by:
        if name in inputs:
            masked |= inputs[name] == 0
    return torch.where(masked & torch.exp(logprobs - policy).isinf(), 0.0, policy)


def weights_of(logprobs: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """[N] weight of each token: the input `weights`, or ones."""
    return inputs["weights"] if "weights" in inputs else torch.ones_like(logprobs, requires_grad=False)
