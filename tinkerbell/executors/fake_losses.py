"""The built-in losses and their slopes for one datum in plain Python; formulas as in `tinkerbell.losses`."""

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

from tinkerbell.errors import InvalidRequest
from tinkerbell.types import BUILTIN_LOSSES, Datum, LossSpec

LARGEST_EXPONENT = 709.0
"""exp of more overflows a float64."""


class LossValue(NamedTuple):
    """One datum's loss."""

    loss: float
    slopes: list[float]
    """[N] dLoss/dlogprob."""
    metrics: dict[str, float]


def loss_inputs(spec: LossSpec, datum: Datum) -> dict[str, list[float]]:
    """The named [N] arrays the loss reads, `weights` being 1 where not given.

    Raises InvalidRequest for an unknown loss or setting, and for missing, unknown or ill-shaped arrays.
    """
    signature = BUILTIN_LOSSES.get(spec.name)
    if signature is None:
        raise InvalidRequest(f"loss `{spec.name}` is not one of {', '.join(BUILTIN_LOSSES)}")
    for name in spec.config:
        if name not in signature.config:
            raise InvalidRequest(f"loss `{spec.name}` has no setting `{name}`")
    for name in signature.required:
        if name not in datum.loss_inputs:
            raise InvalidRequest(f"loss `{spec.name}` needs `{name}` in every datum's loss_inputs")
    arrays: dict[str, list[float]] = {"weights": [1.0] * datum.num_tokens}
    for name, raw in datum.loss_inputs.items():
        if name not in signature.required and name not in signature.optional:
            raise InvalidRequest(f"loss `{spec.name}` does not read `{name}`")
        if len(raw) != 4 * datum.num_tokens:
            raise InvalidRequest(f"loss input `{name}` has {len(raw) / 4:g} numbers for {datum.num_tokens} tokens")
        arrays[name] = list(struct.unpack(f"<{len(raw) // 4}f", raw))
    return arrays


def evaluate(spec: LossSpec, logprobs: Sequence[float], inputs: dict[str, list[float]]) -> LossValue:
    """Loss (a sum) and slopes of one datum, given logprobs [N] nats and its `loss_inputs`."""
    weights = inputs["weights"]
    metrics = {"num_tokens": float(len(logprobs)), "weight_sum": sum(weights)}
    if spec.name == "cross_entropy":
        loss = -sum(w * logprob for w, logprob in zip(weights, logprobs, strict=True))
        return LossValue(loss, [-w for w in weights], metrics)
    config = BUILTIN_LOSSES[spec.name].config | spec.config
    low = config.get("clip_low_threshold", -math.inf)
    high = config.get("clip_high_threshold", math.inf)
    loss = ratio_sum = kl_sum = clipped_sum = 0.0
    slopes: list[float] = []
    rows = zip(weights, logprobs, inputs["logprobs"], inputs["advantages"], strict=True)
    for w, logprob, old, advantage in rows:
        ratio = math.exp(logprob - old) if logprob - old < LARGEST_EXPONENT else math.inf
        plain, clipped = ratio * advantage, min(max(ratio, low), high) * advantage
        loss -= w * min(plain, clipped)
        slopes.append(0.0 if clipped < plain else -w * plain)
        ratio_sum += w * ratio
        kl_sum += w * (old - logprob)
        clipped_sum += w * (clipped < plain)
    metrics |= {"ratio_sum": ratio_sum, "kl_sum": kl_sum}
    if spec.name == "ppo":
        metrics["clipped_sum"] = clipped_sum
    return LossValue(loss, slopes, metrics)
