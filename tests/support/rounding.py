"""How far apart numbers may be: from arithmetic, and from what a reference misses in the same run. Never a machine's.

- fp32 against fp64: the reference (transformers, PEFT) computes the same in both, here and now; what it misses fp64 by
  in fp32, times a factor, is what ours may miss it by: `assert_missed_like`.
- fp64 on both sides: only a wrong formula can differ by more than ALGEBRA.
- One fp32 number in two ways, where there is no reference: CLOSE.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike

FACTOR = 4.0
"""Two orders of the same sums miss by as much again, one of them sometimes by twice that; a wrong formula misses by
thousands of times."""

ALGEBRA = 1e-10
"""Relative. Roundings of fp64 (1e-16 each) stay far below through any number of layers of a test's model; the least
wrong formula, or one fp32 step among the fp64 ones (1e-7), does not."""

EPS = float(np.finfo(np.float32).eps)

CLOSE = 128 * EPS
"""Relative to the largest number that is added on the way (for a logprob the largest logit, with the small models of
tests a few; so it serves as an absolute bound of those, too). Sums of hundreds of numbers, each rounded by half an EPS,
in two orders."""

NATS = 32 * CLOSE
"""Two ways to a logprob of the real model, whose logits reach 32."""


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in the L2 norm, fp64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_missed_like(
    found: ArrayLike | torch.Tensor,
    reference: ArrayLike | torch.Tensor,
    exact: ArrayLike | torch.Tensor,
    what: object = "",
    factor: float = FACTOR,
) -> None:
    """`found` (fp32) misses `exact` (fp64) by at most `factor` times what `reference` (fp32) misses it by: in the mean
    square, and in the worst element. One rounding of the largest number is allowed in any case."""
    ours, theirs = (_misses(each, exact) for each in (found, reference))
    least = EPS * float(np.abs(_array(exact)).max())
    for name, mine, other in zip(("the mean square", "the worst element"), ours, theirs, strict=True):
        bound = factor * max(other, least)
        assert mine <= bound, f"{what}: off by {mine:.3g} in {name}; the reference by {other:.3g}, {factor:g} x allowed"


def assert_sum_missed_like(
    found: float,
    reference: ArrayLike | torch.Tensor,
    exact: ArrayLike | torch.Tensor,
    what: object = "",
    factor: float = FACTOR,
) -> None:
    """The same for the sum of terms: what the reference misses in the terms is added up without signs, since in one sum
    its misses may cancel by luck."""
    terms = _array(exact)
    missed = float(np.abs(_array(reference) - terms).sum())
    bound = factor * max(missed, EPS * float(np.abs(terms).sum()))
    off = abs(found - float(terms.sum()))
    assert off <= bound, f"{what}: a sum off by {off:.3g}; the reference's terms by {missed:.3g}, {factor:g} x allowed"


def _misses(found: ArrayLike | torch.Tensor, exact: ArrayLike | torch.Tensor) -> tuple[float, float]:
    """(mean square, worst)"""
    difference = np.abs(_array(found) - _array(exact))
    return float(np.sqrt(np.mean(difference**2))), float(difference.max())


def _array(numbers: ArrayLike | torch.Tensor) -> np.ndarray:
    """[N] in fp64."""
    if isinstance(numbers, torch.Tensor):
        numbers = numbers.detach().double().numpy()
    return np.asarray(numbers, dtype=np.float64).ravel()
