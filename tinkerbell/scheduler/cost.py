"""What a unit costs: estimates in accelerator microseconds, calibrated by what batches took, and the split of
a batch's measured time over its units. Pure.

forward:          unit + forward_token * tokens + attention * sum(len^2) + lora * tokens * parameters
                  + loss * tokens * targets + entropy * tokens + top * tokens * k + logits * tokens
forward_backward: the same with backward_token and three times the lora, + gradient * parameters, without outputs
optim_step:       unit + parameter * parameters
sample:           unit + prompt_token * prompt + prompt_attention * prompt^2
                  + score * prompt + prompt_value * prompt * (k + targets) + draw * prompt * draws
                  + sampled_token * sampled + sampled_context * sampled * context + sampled_top * sampled * k
control:          a constant for each kind

What a unit has to itself is measured where the executor can tell (BatchResult.own_us); only what it shares with others
is then divided by what it needed. SHARED says which is which.
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
    "lora": 2e-6,
    "loss": 0.1,
    "gradient": 2e-3,
    "entropy": 20.0,
    "top": 20.0,
    "logits": 50.0,
    "parameter": 1e-3,
    "prompt_token": 100.0,
    "prompt_attention": 1e-3,
    "score": 50.0,
    "prompt_value": 20.0,
    "draw": 50.0,
    "sampled_token": 2000.0,
    "sampled_context": 0.1,
    "sampled_top": 20.0,
    "add_lora": 20_000.0,
    "load": 50_000.0,
    "save": 20_000.0,
    "remove_lora": 500.0,
}
"""Microseconds before anything was measured: a small model on a CPU. Only ratios matter, and only at
first."""

SHARED = frozenset({"unit", "forward_token", "backward_token", "attention", "lora", "parameter"})
"""What units of several requests need together; the rest a unit has to itself."""

_RATE = 0.3
_LARGEST_STEP = 2.0
"""Of the log-ratio of measured to estimated time in one correction: one odd batch must not wreck the
model."""


def features(request: PendingRequest, chunk: int, num_parameters: int, result: UnitResult | None = None) -> Features:
    """What one unit needs. Of samples before the result is known, the most they may become.

    `num_parameters`: of the request's adapter (0 where unknown).
    """
    event = request.event
    match event:
        case kinds.ForwardRequested() | kinds.ForwardBackwardRequested():
            return _present(_of_data(request, event, chunk, float(num_parameters)))
        case kinds.OptimStepRequested():
            return {"unit": 1.0, "parameter": float(num_parameters)}
        case kinds.SampleRequested():
            return _present(_of_sample(request, event, chunk, result))
        case _:
            return {request.kind: 1.0}


def _of_data(
    request: PendingRequest,
    event: kinds.ForwardRequested | kinds.ForwardBackwardRequested,
    chunk: int,
    num_parameters: float,
) -> Features:
    start, stop = request.chunks[chunk]
    lengths = (request.lengths or ())[start:stop]
    tokens = float(sum(lengths))
    needed = {"unit": 1.0, "attention": float(sum(n * n for n in lengths)), "loss": tokens * event.num_targets}
    if isinstance(event, kinds.ForwardBackwardRequested):
        return needed | {
            "backward_token": tokens,
            "lora": 3 * tokens * num_parameters,
            "gradient": num_parameters,
        }
    needed |= {"forward_token": tokens, "lora": tokens * num_parameters}
    if (wanted := event.outputs) is not None:
        needed |= {
            "entropy": tokens * wanted.entropy,
            "top": tokens * wanted.top_k,
            "logits": tokens * wanted.logits,
        }
    return needed


def _of_sample(
    request: PendingRequest, event: kinds.SampleRequested, chunk: int, result: UnitResult | None
) -> Features:
    start, stop = request.chunks[chunk]
    params, prompt = event.params, float(event.num_tokens)
    sampled = float((stop - start) * params.max_tokens)
    if isinstance(result, SampleDone):
        sampled = float(sum(len(sequence.tokens) // 4 for sequence in result.sequences))
    needed = {
        "unit": 1.0,
        "prompt_token": prompt,
        "prompt_attention": prompt * prompt,
        "sampled_token": sampled,
        "sampled_context": sampled * (prompt + params.max_tokens / 2),
        "sampled_top": sampled * params.top_logprobs,
    }
    first, last = request.draws_of(chunk)
    values = params.prompt_top_logprobs + request.num_prompt_targets if chunk == 0 else 0
    scored = values > 0 or last > first or (chunk == 0 and params.prompt_logprobs)
    return needed | {
        "score": prompt * scored,
        "prompt_value": prompt * values,
        "draw": prompt * (last - first),
    }


def in_turn(needed: Features) -> Features:
    """What of it is done one after another. Tokens are sampled side by side, in passes of all that are under way."""
    return {name: amount for name, amount in needed.items() if name not in ("sampled_token", "sampled_context")}


def _present(needed: Features) -> Features:
    return {name: amount for name, amount in needed.items() if amount}


def shared(needed: Features) -> Features:
    """What of it others need at the same time."""
    return {name: amount for name, amount in needed.items() if name in SHARED}


def own(needed: Features) -> Features:
    """What of it is the unit's alone."""
    return {name: amount for name, amount in needed.items() if name not in SHARED}


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


def divide_us(busy_us: int, needed: Sequence[Features], own_us: Sequence[int] | None, model: CostModel) -> list[int]:
    """A batch's time over its units; the parts sum to it. Each has what it had to itself, where the executor told, and
    a part of the rest by what it needed of that."""
    if own_us is None:
        return split_us(busy_us, [model.estimate_us(each) for each in needed])
    alone_us = sum(own_us)
    if alone_us > busy_us:
        return split_us(busy_us, [max(1, each) for each in own_us])
    rest = split_us(busy_us - alone_us, [model.estimate_us(shared(each)) for each in needed])
    return [mine + part for mine, part in zip(own_us, rest, strict=True)]


def learn(model: CostModel, busy_us: int, needed: Sequence[Features], own_us: Sequence[int] | None) -> None:
    """Teach the model what a batch took: as a whole, or what each unit took and then what they shared."""
    if own_us is None:
        model.observe(needed, busy_us)
        return
    for each, mine in zip(needed, own_us, strict=True):
        model.observe([own(each)], mine)
    model.observe([shared(each) for each in needed], max(0, busy_us - sum(own_us)))


def split_us(busy_us: int, weights: Sequence[int]) -> list[int]:
    """`busy_us` in whole microseconds in proportion to `weights` (> 0), the remainder to the last."""
    total = sum(weights)
    parts = [busy_us * weight // total for weight in weights]
    parts[-1] += busy_us - sum(parts)
    return parts
