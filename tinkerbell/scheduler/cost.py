"""What a unit costs: estimates in accelerator microseconds, calibrated by what batches took, and the split of
a batch's measured time over its units. Pure.

cost = unit + forward_token * tokens + attention * sum(len^2)         forward; backward_token with gradients
     = unit + parameter * parameters                                  optim_step
     = unit + prompt_token * prompt + sampled_token * sampled         sample
     = a constant                                                     each kind of control request
"""

import math
from collections.abc import Mapping, Sequence

from tinkerbell.events import kinds
from tinkerbell.executors.port import SampleDone, UnitResult
from tinkerbell.scheduler.pending import PendingRequest

Features = dict[str, float]
"""Coefficient name -> how much of it a unit needs."""

PRIOR_US: dict[str, float] = {
    "unit": 200.0,
    "forward_token": 100.0,
    "backward_token": 300.0,
    "attention": 1e-3,
    "parameter": 1e-3,
    "prompt_token": 100.0,
    "sampled_token": 2000.0,
    "add_lora": 20_000.0,
    "load": 50_000.0,
    "save": 20_000.0,
    "remove_lora": 500.0,
}
"""Microseconds before anything was measured: a small model on a CPU. Only ratios matter, and only at
first."""

_RATE = 0.3
_LARGEST_STEP = 2.0
"""Of the log-ratio of measured to estimated time in one correction: one odd batch must not wreck the
model."""


def features(request: PendingRequest, chunk: int, num_parameters: int, result: UnitResult | None = None) -> Features:
    """What one unit needs. Of samples before the result is known, the most they may become.

    `num_parameters`: of the request's adapter (0 where unknown).
    """
    event = request.event
    if isinstance(event, kinds.ForwardRequested | kinds.ForwardBackwardRequested):
        start, stop = request.chunks[chunk]
        lengths = (request.lengths or ())[start:stop]
        per_token = "forward_token" if request.kind == "forward" else "backward_token"
        return {"unit": 1.0, per_token: float(sum(lengths)), "attention": float(sum(n * n for n in lengths))}
    if isinstance(event, kinds.OptimStepRequested):
        return {"unit": 1.0, "parameter": float(num_parameters)}
    if isinstance(event, kinds.SampleRequested):
        start, stop = request.chunks[chunk]
        sampled = (stop - start) * event.params.max_tokens
        if isinstance(result, SampleDone):
            sampled = sum(len(sequence.tokens) // 4 for sequence in result.sequences)
        return {"unit": 1.0, "prompt_token": float(event.num_tokens), "sampled_token": float(sampled)}
    return {request.kind: 1.0}


class CostModel:
    """Linear in the features, corrected after every batch by a multiplicative step: each coefficient moves
    with its share of the estimate, and stays positive (exponentiated gradient, Kivinen & Warmuth 1997)."""

    def __init__(self, coefficients_us: Mapping[str, float] = PRIOR_US) -> None:
        self.coefficients_us = dict(coefficients_us)

    def estimate_us(self, needed: Features) -> int:
        """At least 1."""
        return max(1, round(self._sum(needed)))

    def observe(self, batch: Sequence[Features], busy_us: int) -> None:
        """A batch of these units took `busy_us`."""
        estimated = sum(self._sum(needed) for needed in batch)
        if estimated <= 0:
            return
        surprise = math.log(max(busy_us, 1) / estimated)
        surprise = min(max(surprise, -_LARGEST_STEP), _LARGEST_STEP)
        shares: dict[str, float] = {}
        for needed in batch:
            for name, amount in needed.items():
                shares[name] = shares.get(name, 0.0) + self.coefficients_us[name] * amount / estimated
        for name, share in shares.items():
            self.coefficients_us[name] *= math.exp(_RATE * share * surprise)

    def _sum(self, needed: Features) -> float:
        return sum(self.coefficients_us[name] * amount for name, amount in needed.items())


def split_us(busy_us: int, weights: Sequence[int]) -> list[int]:
    """`busy_us` in whole microseconds in proportion to `weights` (> 0), the remainder to the last."""
    total = sum(weights)
    parts = [busy_us * weight // total for weight in weights]
    parts[-1] += busy_us - sum(parts)
    return parts
