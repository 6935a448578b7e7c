"""The built-in losses and their slopes for one datum in plain Python; formulas as in `tinkerbell.losses`.

N tokens, K targets of each, row after row.
"""

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
    """[N K] dLoss/dlogprob."""
    metrics: dict[str, float]


def loss_inputs(spec: LossSpec, datum: Datum) -> dict[str, list[float]]:
    """The named [N K] arrays the loss reads, the optional ones too.

    Raises InvalidRequest for an unknown loss or setting, and for missing, unknown or ill-shaped arrays and targets.
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
    num_targets, rest = divmod(len(datum.targets), len(datum.tokens))
    if rest or num_targets < 1 or (num_targets > 1 and not signature.several_targets):
        raise InvalidRequest(f"loss `{spec.name}`: {len(datum.targets) / 4:g} targets for {datum.num_tokens} tokens")
    for name, raw in datum.loss_inputs.items():
        if name not in signature.required and name not in signature.optional:
            raise InvalidRequest(f"loss `{spec.name}` does not read `{name}`")
        if len(raw) != len(datum.targets):
            raise InvalidRequest(
                f"loss input `{name}` has {len(raw) / 4:g} numbers for {len(datum.targets) // 4} targets"
            )
    return {
        name: list(struct.unpack(f"<{len(datum.targets) // 4}f", signature.input_of(datum, name)))
        for name in (*signature.required, *signature.optional)
    }


def evaluate(spec: LossSpec, logprobs: Sequence[float], inputs: dict[str, list[float]]) -> LossValue:
    """Loss (a sum) and slopes of one datum, given logprobs [N K] nats and its `loss_inputs`."""
    weights = inputs["weights"]
    metrics = {"num_tokens": float(len(logprobs)), "weight_sum": sum(weights)}
    if spec.name == "cross_entropy":
        loss = -sum(w * logprob for w, logprob in zip(weights, logprobs, strict=True))
        return LossValue(loss, [-w for w in weights], metrics)
    config = BUILTIN_LOSSES[spec.name].config | spec.config
    low, high = config.get("clip_low_threshold", -math.inf), config.get("clip_high_threshold", math.inf)
    away = [
        logprob if _is_filler(spec, inputs, row, logprob - old) else logprob - old
        for row, (logprob, old) in enumerate(zip(logprobs, inputs["logprobs"], strict=True))
    ]
    ratios = [_exp(each) for each in away]
    advantages = inputs["advantages"]
    if spec.name == "gspo":
        mask = inputs["sequence_ratio_mask"]
        weights = [w * m for w, m in zip(weights, mask, strict=True)]
        count = sum(mask)
        mean = sum(m * each for m, each in zip(mask, away, strict=True)) / count if count > 0 else 0.0
        ratios = [_exp(mean)] * len(away)
        metrics["weight_sum"] = sum(weights)
    plain = [r * a for r, a in zip(ratios, advantages, strict=True)]
    bounded = [min(max(r, low), high) * a for r, a in zip(ratios, advantages, strict=True)]
    is_clipped = [b < p for b, p in zip(bounded, plain, strict=True)]
    match spec.name:
        case "cispo":
            terms = [b * logprob for b, logprob in zip(bounded, logprobs, strict=True)]
            slopes = bounded
            is_clipped = [r != min(max(r, low), high) for r in ratios]
        case "dro":
            rows = list(zip(advantages, logprobs, away, strict=True))
            terms = [a * logprob - config["beta"] / 2 * d**2 for a, logprob, d in rows]
            slopes = [a - config["beta"] * d for a, _, d in rows]
        case _:
            terms = [min(p, b) for p, b in zip(plain, bounded, strict=True)]
            slopes = [0.0 if c else p for p, c in zip(plain, is_clipped, strict=True)]
    loss = -sum(w * term for w, term in zip(weights, terms, strict=True))
    gradient = [-w * slope for w, slope in zip(weights, slopes, strict=True)]
    if spec.name == "gspo":
        # Every token of the ratio moves all terms.
        gradient = [m * sum(gradient) / count if count > 0 else 0.0 for m in mask]
    metrics["ratio_sum"] = sum(w * r for w, r in zip(weights, ratios, strict=True))
    metrics["kl_sum"] = -sum(w * each for w, each in zip(weights, away, strict=True))
    if "clip_low_threshold" in config:
        metrics["clipped_sum"] = float(sum(w * c for w, c in zip(weights, is_clipped, strict=True)))
    return LossValue(loss, gradient, metrics)


def _is_filler(spec: LossSpec, inputs: dict[str, list[float]], row: int, away: float) -> bool:
    """Whether no policy gave this masked token such a logprob; it counts as 0 then."""
    return away >= LARGEST_EXPONENT and any(inputs[name][row] == 0 for name in BUILTIN_LOSSES[spec.name].masked_by)


def _exp(value: float) -> float:
    return math.exp(value) if value < LARGEST_EXPONENT else math.inf
