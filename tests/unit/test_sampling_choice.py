"""The choice of one token from one row of logits."""

import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rounding import CLOSE
from tinkerbell.executors.hf.sampling import choose, likeliest, normaliser, nucleus
from tinkerbell.executors.randomness import uniform
from tinkerbell.types import SamplingParams

ROWS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40).map(torch.tensor)
UNIFORMS = st.floats(0, 1, exclude_max=True)


def probabilities(logits: torch.Tensor, params: SamplingParams) -> list[float]:
    """The distribution `choose` should have, written plainly."""
    scaled = [float(z) / params.temperature for z in logits.double()]
    highest = max(scaled)
    weights = {v: math.exp(z - highest) for v, z in enumerate(scaled)}
    order = sorted(weights, key=lambda v: (-scaled[v], v))
    if params.top_k > 0:
        order = order[: params.top_k]
    total = sum(weights[v] for v in order)
    kept, reached = [], 0.0
    for v in order:
        kept.append(v)
        reached += weights[v]
        if reached >= params.top_p * total:
            break
    total = sum(weights[v] for v in kept)
    return [weights[v] / total if v in kept else 0.0 for v in range(len(scaled))]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=3.0, top_k=4),
        SamplingParams(top_p=0.7),
        SamplingParams(temperature=1.5, top_k=6, top_p=0.8),
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-6),
    ],
    ids=str,
)
def test_frequencies_are_the_distribution(params: SamplingParams) -> None:
    """By an even grid of u instead of luck: each token's share of the grid is its probability."""
    logits = torch.tensor([0.3, 2.0, -1.0, 2.0, 0.0, 1.1, -4.0, 1.9])
    steps = 4000
    counts = [0] * len(logits)
    for i in range(steps):
        counts[choose(logits, params, (i + 0.5) / steps)] += 1
    for count, probability in zip(counts, probabilities(logits, params), strict=True):
        assert count / steps == pytest.approx(probability, abs=1.5 / steps)


def test_the_counter_is_uniform() -> None:
    """Mean, spread and lag-one correlation over tokens, samples and seeds."""
    for places in (
        [(7, 0, i) for i in range(4000)],
        [(7, i, 3) for i in range(4000)],
        [(i, 0, 0) for i in range(4000)],
    ):
        values = [uniform(*place) for place in places]
        assert all(0 <= u < 1 for u in values)
        assert sum(values) / 4000 == pytest.approx(0.5, abs=0.02)
        centred = [u - 0.5 for u in values]
        variance = sum(c * c for c in centred) / 4000
        assert variance == pytest.approx(1 / 12, abs=0.005)
        lag = sum(a * b for a, b in pairwise(centred)) / 4000 / variance
        assert abs(lag) < 0.06


def test_the_counter_never_changes() -> None:
    """Old logs must sample the same tokens for ever."""
    assert [uniform(0, 0, 0), uniform(1, 2, 3), uniform(2**63 - 1, 255, 10**6)] == GOLDEN


GOLDEN = [0.614770869108788, 0.08354080494020988, 0.88407560599495]


@given(ROWS, UNIFORMS, st.floats(0.05, 10), st.integers(-1, 45), st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_a_choice_is_among_what_the_cuts_keep(
    logits: torch.Tensor, u: float, temperature: float, top_k: int, top_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    token = choose(logits, params, u)
    rank = sorted(range(len(logits)), key=lambda v: (-float(logits[v]), v)).index(token)
    if top_k > 0:
        assert rank < top_k
    # Tokens likelier than it must not reach top_p by themselves, up to rounding.
    weights = torch.softmax(logits.double() / temperature, 0).sort(descending=True).values
    weights = weights[:top_k] if top_k > 0 else weights
    before = float(weights[:rank].sum() / weights.sum())
    assert before < top_p + 1e-9


@given(ROWS, UNIFORMS)
@settings(max_examples=100, deadline=None)
def test_cuts_that_keep_everything_change_nothing(logits: torch.Tensor, u: float) -> None:
    plain = choose(logits, SamplingParams(), u)
    assert choose(logits, SamplingParams(top_k=len(logits)), u) == plain
    assert choose(logits, SamplingParams(top_k=0), u) == plain
    assert choose(logits, SamplingParams(top_k=10_000_000), u) == plain


@given(ROWS, UNIFORMS)
@settings(max_examples=100, deadline=None)
def test_the_coldest_choice_is_greedy(logits: torch.Tensor, u: float) -> None:
    """temperature 0, top_k 1 and a vanishing top_p are the likeliest token, the lowest id among equals."""
    likely = int(torch.argmax(logits))
    assert likely == min(v for v in range(len(logits)) if logits[v] == logits.max())
    for params in (SamplingParams(temperature=0.0), SamplingParams(top_k=1), SamplingParams(top_p=1e-9)):
        assert choose(logits, params, u) == likely


def test_extreme_settings_stay_finite() -> None:
    logits = torch.tensor([1000.0, -1000.0, 999.0])
    for temperature in (1e-30, 1e-3, 100.0):
        assert choose(logits, SamplingParams(temperature=temperature), 0.999999) in (0, 2)
    assert choose(torch.tensor([-math.inf, 3.0, -math.inf]), SamplingParams(), 0.9999999999999999) == 1


def test_equals_are_kept_by_id() -> None:
    scores = torch.tensor([0.0, 5.0, 5.0, 5.0, 1.0])
    assert likeliest(scores, 2).tolist() == [1, 2]
    assert likeliest(scores, 5).tolist() == [1, 2, 3, 4, 0]


def test_the_nucleus_of_a_large_vocabulary() -> None:
    """Both where a few tokens reach top_p and where thousands are needed."""
    generator = torch.Generator().manual_seed(0)
    for spread in (0.01, 5.0):
        logits = torch.randn(20_000, generator=generator, dtype=torch.float64) * spread
        weights = torch.softmax(logits, 0)
        share = weights.sort(descending=True).values.cumsum(0)
        expected = int((share < 0.9).sum()) + 1
        assert abs(len(nucleus(logits, weights, None, 0.9)) - expected) <= 1


def test_normaliser_is_log_sum_exp() -> None:
    logits = torch.randn(50_000, generator=torch.Generator().manual_seed(1)) * 5
    expected = float(torch.logsumexp(logits.double(), 0))
    assert normaliser(logits) == pytest.approx(expected, abs=CLOSE)
    for bad in (math.nan, math.inf):
        logits[7] = bad
        assert not math.isfinite(normaliser(logits))


def test_a_choice_is_a_pure_function() -> None:
    """Whatever was chosen before and however often."""
    generator = random.Random(0)
    rows = [torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    params = SamplingParams(temperature=0.8, top_k=100, top_p=0.95)
    first = {(i, j): choose(rows[i], params, uniform(1, i, j)) for i in range(4) for j in range(5)}
    places = list(first)
    generator.shuffle(places)
    assert {place: choose(rows[place[0]], params, uniform(1, *place)) for place in places} == first
