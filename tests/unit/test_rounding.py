"""The bounds that numeric tests share: what they let pass and what not, and that no test makes up one of its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.rounding import EPS, FACTOR, assert_missed_like, assert_sum_missed_like

TESTS = Path(__file__).parents[1]
EXACT = np.random.default_rng(1).normal(size=500)


def off(times: float, seed: int) -> np.ndarray:
    """EXACT with so many roundings of fp32."""
    return EXACT + times * EPS * np.random.default_rng(seed).normal(size=len(EXACT))


def test_as_far_off_as_the_reference_is_near_enough() -> None:
    assert_missed_like(off(10, 1), off(10, 2), EXACT)
    assert_missed_like(off(FACTOR * 5, 1), off(10, 2), EXACT)
    assert_missed_like(EXACT, EXACT, EXACT)
    assert_missed_like(EXACT + EPS, EXACT, EXACT), "a reference without any miss does not ask for bits"


@pytest.mark.parametrize("factor", [FACTOR, 1.0])
def test_farther_off_is_not(factor: float) -> None:
    with pytest.raises(AssertionError, match=r"gradient of a: off by .* in the mean square"):
        assert_missed_like(off(factor * 20, 1), off(10, 2), EXACT, "gradient of a", factor)
    one = off(5, 1)
    one[7] += 100 * factor * EPS
    with pytest.raises(AssertionError, match="in the worst element"):
        assert_missed_like(one, off(10, 2), EXACT, factor=factor)


def test_misses_of_a_sum_do_not_cancel() -> None:
    two = np.array([EPS, -EPS])
    lucky, terms = 10 * two, np.array([1.0, 1.0])
    assert_sum_missed_like(2.0 + 20 * EPS, terms + lucky, terms)
    with pytest.raises(AssertionError, match="a sum off by"):
        assert_sum_missed_like(2.0 + 200 * EPS, terms + lucky, terms)


# ---- the kind --------------------------------------------------------------------------------------------------------

BOUNDS = {"rel", "abs", "rtol", "atol"}
STATISTICAL = 1e-3
"""A larger bound is of counts and frequencies, not of rounding."""
CLOCKS = {"monotonic", "perf_counter", "time"}


def made_up(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Places where a number of rounding's size is a bound, or a number of seconds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in BOUNDS and _small(keyword.value):
                    yield node.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}"
        elif isinstance(node, ast.Compare) and isinstance(node.ops[-1], ast.Lt | ast.LtE):
            *_, compared, bound = node.left, *node.comparators
            timed = any(isinstance(each, ast.Attribute) and each.attr in CLOCKS for each in ast.walk(compared))
            if _small(bound) or (timed and isinstance(bound, ast.Constant)):
                yield node.lineno, ast.unparse(node)


def _small(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, float) and 0 < node.value < STATISTICAL


def test_every_bound_of_rounding_and_of_time_has_its_reason_in_one_place() -> None:
    """In tests/support/rounding.py and waiting.py: a figure of one machine fails on another."""
    found = [
        f"{path.relative_to(TESTS)}:{line}: {what}"
        for path in sorted(TESTS.rglob("*.py"))
        for line, what in made_up(ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "num"),
    [
        ("assert x == approx(y, rel=1e-6)", 1),
        ("assert_allclose(x, y, atol=2e-6, rtol=1e-7)", 2),
        ("assert abs(x - y).max() < 1e-5", 1),
        ("assert time.monotonic() - began < 5.0", 1),
        ("assert 0.3 < time.monotonic() - began < 10", 1),
        ("assert x == approx(y, rel=CLOSE) and time.monotonic() - began < AT_ONCE_S and p < 0.01", 0),
        ("assert x > 1e-5 and time.monotonic() - began >= 0.2", 0),
    ],
)
def test_what_is_looked_for_is_found(text: str, num: int) -> None:
    assert len(list(made_up(ast.parse(text)))) == num
