"""Chooses one token from one row of logits.

A pure function of the row, the settings and one uniform number, computed in tensors of one dimension: what is
sampled beside it cannot change it. Shapes: V vocabulary, C candidates left after the cuts.
"""

import math

import torch
from torch import Tensor

from tinkerbell.types import SamplingParams

FEW = 1024
"""Candidates looked at before a whole vocabulary is sorted for top_p."""


def choose(logits: Tensor, params: SamplingParams, u: float) -> int:
    """The token for logits [V] (finite) and u in [0, 1).

    Temperature, then top_k, then top_p (Holtzman et al. 2019, arXiv 1904.09751) on what top_k left,
    renormalised, then the inverse of the cumulative distribution at u, tokens in order of their ids. Of equally
    likely tokens the lower ids are kept first. Temperature 0 is the likeliest token.
    """
    if params.temperature == 0:
        # numpy takes the first of equals, and a tenth of the time of torch.argmax.
        return int(logits.numpy().argmax())
    # The largest is subtracted before the division, so that a tiny temperature cannot overflow.
    weights = (logits.double() - logits.max().double()).div_(params.temperature).exp_()
    candidates: Tensor | None = None
    if 0 < params.top_k < len(logits):
        candidates = likeliest(logits, params.top_k)
    if params.top_p < 1:
        candidates = nucleus(logits, weights, candidates, params.top_p)
    if candidates is not None:
        candidates = candidates.sort().values
        weights = weights[candidates]
    cumulative = weights.cumsum(0)
    index = int(torch.searchsorted(cumulative, u * float(cumulative[-1]), right=True))
    index = min(index, _last_positive(cumulative))
    return index if candidates is None else int(candidates[index])


def _last_positive(cumulative: Tensor) -> int:
    """The last token with any probability: rounding of u * total must not choose one behind it."""
    return int(torch.searchsorted(cumulative, cumulative[-1]))


def likeliest(scores: Tensor, k: int) -> Tensor:
    """[k] ids of the largest of scores [V], largest first, lower ids first among equals."""
    smallest = torch.topk(scores, k, sorted=False).values.min()
    ids = torch.nonzero(scores >= smallest).squeeze(1)
    order = torch.sort(scores[ids], descending=True, stable=True).indices[:k]
    return ids[order]


def nucleus(logits: Tensor, weights: Tensor, candidates: Tensor | None, top_p: float) -> Tensor:
    """[C] ids, likeliest first: the fewest whose share of the candidates' weight reaches `top_p`.

    weights [V] are proportional to probabilities and ordered as logits [V] are; candidates [k] likeliest first,
    None for all tokens.
    """
    if candidates is None:
        wanted = top_p * float(weights.sum())
        candidates = likeliest(logits, min(FEW, len(logits)))
        if float(weights[candidates].sum()) < wanted:
            candidates = likeliest(logits, len(logits))
    else:
        wanted = top_p * float(weights[candidates].sum())
    needed = int(torch.searchsorted(weights[candidates].cumsum(0), wanted)) + 1
    return candidates[:needed]


def normaliser(logits: Tensor) -> float:
    """log sum exp of logits [V]: a token's logprob is its logit less this. NaN where a logit is NaN or infinite,
    except that minus infinity is a token that cannot be.
    """
    largest = logits.max()
    total = float((logits - largest).exp_().sum(dtype=torch.float64))
    return float(largest) + math.log(total) if total > 0 else math.nan
