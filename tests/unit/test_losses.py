"""The built-in losses: formulas by hand, gradients, and the contract's list of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rounding import ALGEBRA, CLOSE
from tinkerbell.errors import InvalidRequest
from tinkerbell.executors import fake_losses
from tinkerbell.losses import registry
from tinkerbell.types import BUILTIN_LOSSES, LossSpec

LOGPROBS = torch.tensor([-1.0, -2.0, -0.5, -3.0])
POLICY = {"logprobs": torch.tensor([-1.2, -1.5, -0.5, -3.5]), "advantages": torch.tensor([1.0, -2.0, 0.5, 3.0])}
MASK = {"sequence_ratio_mask": torch.tensor([1.0, 1.0, 0.0, 1.0])}
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0])


def value(name: str, inputs: dict[str, torch.Tensor], **config: float) -> registry.LossValue:
    return registry.evaluate(registry.resolve(LossSpec(name=name, config=config)), LOGPROBS, inputs, [1, 3])


def test_the_contract_lists_exactly_the_losses_there_are() -> None:
    assert set(registry.functions()) == set(BUILTIN_LOSSES)


@pytest.mark.parametrize("name", BUILTIN_LOSSES)
def test_a_loss_reads_what_its_signature_says(name: str) -> None:
    """It runs with the required inputs alone, fails without any one of them, and its weights are optional."""
    signature = BUILTIN_LOSSES[name]
    inputs = {key: torch.full((4,), 0.3) for key in signature.required}
    if "sequence_ratio_mask" in inputs:
        inputs["sequence_ratio_mask"] = torch.ones(4)
    plain = value(name, inputs)
    for key in signature.required:
        with pytest.raises(KeyError, match=key):
            value(name, {k: v for k, v in inputs.items() if k != key})
    for key in signature.optional:
        assert value(name, inputs | {key: torch.ones(4)}).loss == plain.loss
        assert value(name, inputs | {key: torch.full((4,), 2.0)}).loss == pytest.approx(2 * plain.loss)
        assert value(name, inputs | {key: torch.zeros(4)}).loss == 0
    for setting in signature.config:
        value(name, inputs, **{setting: 0.5})


@pytest.mark.parametrize("name", BUILTIN_LOSSES)
def test_micro_batches_add(name: str) -> None:
    inputs = {key: (POLICY | MASK)[key] for key in BUILTIN_LOSSES[name].required}
    loss = registry.resolve(LossSpec(name=name))
    whole = registry.evaluate(loss, LOGPROBS, inputs, [2, 2])
    halves = [
        registry.evaluate(loss, LOGPROBS[part], {k: v[part] for k, v in inputs.items()}, [2])
        for part in (slice(0, 2), slice(2, 4))
    ]
    assert sum(half.loss for half in halves) == pytest.approx(whole.loss, rel=ALGEBRA)
    for metric, total in whole.metrics.items():
        assert sum(half.metrics[metric] for half in halves) == pytest.approx(total, rel=ALGEBRA, abs=ALGEBRA)
    assert torch.equal(torch.cat([half.gradient for half in halves]), whole.gradient)


def test_cross_entropy() -> None:
    found = value("cross_entropy", {"weights": WEIGHTS})
    assert found.loss == pytest.approx(1.0 + 1.0 + 0.0 + 6.0)
    assert found.metrics == {"num_tokens": 4.0, "weight_sum": 3.5}
    assert torch.equal(found.gradient, -WEIGHTS)


def test_importance_sampling() -> None:
    found = value("importance_sampling", POLICY | {"weights": WEIGHTS})
    ratio = [math.exp(0.2), math.exp(-0.5), 1.0, math.exp(0.5)]
    terms = [1.0 * ratio[0], 0.5 * ratio[1] * -2.0, 0.0, 2.0 * ratio[3] * 3.0]
    assert found.loss == pytest.approx(-sum(terms), rel=CLOSE)
    assert found.gradient.tolist() == pytest.approx([-term for term in terms], rel=CLOSE, abs=ALGEBRA)
    assert found.metrics["ratio_sum"] == pytest.approx(ratio[0] + 0.5 * ratio[1] + 2 * ratio[3], rel=CLOSE)
    assert found.metrics["kl_sum"] == pytest.approx(-0.2 + 0.5 * 0.5 + 2 * -0.5, rel=CLOSE)


def test_ppo_clips_only_where_it_lowers_the_objective() -> None:
    found = value("ppo", POLICY)
    ratio = [math.exp(0.2), math.exp(-0.5), 1.0, math.exp(0.5)]
    # 1.2214 > 1.2 with A > 0: clipped. 0.6065 < 0.8 with A < 0: clipped (-1.6 < -1.213). 1.0: plain. 1.6487: clipped.
    terms = [1.2, 0.8 * -2.0, 0.5, 1.2 * 3.0]
    assert ratio[0] > 1.2
    assert found.loss == pytest.approx(-sum(terms), rel=CLOSE)
    assert found.gradient.tolist() == pytest.approx([0.0, 0.0, -0.5, 0.0], rel=CLOSE)
    assert found.metrics["clipped_sum"] == 3.0
    assert found.metrics["num_tokens"] == 4.0


def test_ppo_settings_are_bounds_of_the_ratio() -> None:
    found = value("ppo", POLICY, clip_low_threshold=0.1, clip_high_threshold=10.0)
    assert found.metrics["clipped_sum"] == 0.0
    assert found.loss == pytest.approx(value("importance_sampling", POLICY).loss)


def test_cispo_keeps_the_gradient_of_what_it_clips() -> None:
    found = value("cispo", POLICY | {"weights": WEIGHTS}, clip_high_threshold=1.5)
    clipped = [math.exp(0.2), math.exp(-0.5), 1.0, 1.5]
    slopes = [-1.0 * clipped[0], -0.5 * clipped[1] * -2.0, 0.0, -2.0 * clipped[3] * 3.0]
    assert found.gradient.tolist() == pytest.approx(slopes, rel=CLOSE, abs=ALGEBRA)
    assert found.loss == pytest.approx(sum(s * x for s, x in zip(slopes, LOGPROBS.tolist(), strict=True)), rel=CLOSE)
    assert found.metrics["clipped_sum"] == 2.0, "of the last token, whose weight is 2"


def test_dro() -> None:
    found = value("dro", POLICY, beta=0.5)
    away = [0.2, -0.5, 0.0, 0.5]
    rows = list(zip([1.0, -2.0, 0.5, 3.0], LOGPROBS.tolist(), away, strict=True))
    assert found.loss == pytest.approx(-sum(a * x - 0.25 * d**2 for a, x, d in rows), rel=CLOSE)
    assert found.gradient.tolist() == pytest.approx([-(a - 0.5 * d) for a, _, d in rows], rel=CLOSE)


def test_gspo_has_one_ratio_for_a_sequence() -> None:
    """Two sequences: one token, and three of which the second is not of the answer."""
    loose = {"clip_low_threshold": 0.1, "clip_high_threshold": 10.0}
    found = value("gspo", POLICY | MASK, **loose)
    first, second = math.exp(0.2), math.exp((-0.5 + 0.5) / 2)
    assert found.loss == pytest.approx(-(first * 1.0 + second * (-2.0 + 3.0)), rel=CLOSE)
    # d s / d logprob = s / 2 for each of the two tokens.
    expected = [-first, -second / 2, 0.0, -second / 2]
    assert found.gradient.tolist() == pytest.approx(expected, rel=CLOSE, abs=ALGEBRA)
    assert found.metrics["weight_sum"] == 3.0
    tight = value("gspo", POLICY | MASK)
    assert tight.metrics["clipped_sum"] == 1.0 and tight.gradient[0] == 0.0


def test_gspo_of_a_sequence_without_an_answer_is_nothing() -> None:
    found = value("gspo", POLICY | {"sequence_ratio_mask": torch.tensor([0.0, 1.0, 1.0, 1.0])})
    assert found.gradient[0] == 0.0 and math.isfinite(found.loss)


SLOPE_STEP = 1e-6
"""Differences of so small a step in fp64 are off by its square, and by roundings (1e-16) over it."""


@pytest.mark.parametrize("name", sorted(set(BUILTIN_LOSSES) - {"cispo"}))
def test_gradients_are_slopes(name: str) -> None:
    """Finite differences; not of cispo, whose ratio is a constant to its own gradient."""
    loss = registry.resolve(LossSpec(name=name))
    inputs = {key: (POLICY | MASK)[key].double() for key in BUILTIN_LOSSES[name].required}
    logprobs = LOGPROBS.double()
    found = registry.evaluate(loss, logprobs, inputs, [1, 3])
    for i in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = SLOPE_STEP
        above, below = (registry.evaluate(loss, logprobs + s, inputs, [1, 3]).loss for s in (step, -step))
        assert found.gradient[i].item() == pytest.approx((above - below) / (2 * SLOPE_STEP), rel=CLOSE, abs=SLOPE_STEP)


@pytest.mark.parametrize("name", BUILTIN_LOSSES)
def test_the_fake_executor_has_the_same(name: str) -> None:
    spec = LossSpec(name=name)
    inputs = {key: (POLICY | MASK)[key] for key in BUILTIN_LOSSES[name].required} | {"weights": WEIGHTS}
    there = registry.evaluate(registry.resolve(spec), LOGPROBS, inputs, [4])
    lists = {key: array.double().tolist() for key, array in inputs.items()}
    here = fake_losses.evaluate(spec, LOGPROBS.double().tolist(), lists)
    assert here.loss == pytest.approx(there.loss, rel=ALGEBRA)
    assert here.slopes == pytest.approx(there.gradient.tolist(), rel=CLOSE, abs=ALGEBRA)
    assert here.metrics == pytest.approx(there.metrics, rel=ALGEBRA, abs=ALGEBRA)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(BUILTIN_LOSSES)),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    spread=st.sampled_from([1e-4, 0.3]),
    empty=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_sequence_is_the_same_among_others_and_in_the_fake_executor(
    name: str, lengths: list[int], spread: float, empty: bool, seed: int
) -> None:
    """Any sequences, with default settings; `empty`: the first has no token of an answer."""
    draw = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logprobs = -4 * torch.rand(n, generator=draw)
    mask = torch.randint(0, 2, (n,), generator=draw).float()
    if empty:
        mask[: lengths[0]] = 0
    known = {
        "logprobs": logprobs + spread * torch.randn(n, generator=draw),
        "advantages": torch.randn(n, generator=draw),
        "sequence_ratio_mask": mask,
    }
    inputs = {key: known[key] for key in BUILTIN_LOSSES[name].required} | {"weights": torch.rand(n, generator=draw)}
    spec = LossSpec(name=name)
    loss = registry.resolve(spec)
    whole = registry.evaluate(loss, logprobs, inputs, lengths)
    fakes, gradients = [], []
    for rows in torch.split(torch.arange(n), lengths):
        mine = {key: array[rows] for key, array in inputs.items()}
        gradients.append(registry.evaluate(loss, logprobs[rows], mine, [len(rows)]).gradient)
        lists = {key: array.tolist() for key, array in mine.items()}
        fakes.append(fake_losses.evaluate(spec, logprobs[rows].tolist(), lists))
    assert torch.equal(torch.cat(gradients), whole.gradient)
    if name == "gspo" and empty:
        assert not whole.gradient[: lengths[0]].any()
    slopes = [slope for fake in fakes for slope in fake.slopes]
    assert slopes == pytest.approx(whole.gradient.tolist(), rel=CLOSE, abs=ALGEBRA)
    assert math.fsum(fake.loss for fake in fakes) == pytest.approx(whole.loss, rel=ALGEBRA, abs=ALGEBRA)
    sums = {key: math.fsum(fake.metrics[key] for fake in fakes) for key in fakes[0].metrics}
    assert sums == pytest.approx(whole.metrics, rel=ALGEBRA, abs=ALGEBRA)


def both(
    spec: LossSpec, logprobs: torch.Tensor, inputs: dict[str, torch.Tensor], lengths: list[int]
) -> tuple[registry.LossValue, fake_losses.LossValue]:
    """The loss, and that of the first sequence in the fake executor."""
    lists = {key: array[: lengths[0]].double().tolist() for key, array in inputs.items()}
    there = registry.evaluate(registry.resolve(spec), logprobs, inputs, lengths)
    return there, fake_losses.evaluate(spec, logprobs[: lengths[0]].double().tolist(), lists)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(BUILTIN_LOSSES)),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    filler=st.floats(-(2.0**127), -800.0, width=32),
    by=st.integers(0, 10),
    seed=st.integers(0, 2**31),
)
def test_what_a_masked_token_has_for_a_logprob_is_as_if_it_were_0(
    name: str, lengths: list[int], filler: float, by: int, seed: int
) -> None:
    """Of any loss, and whichever of its inputs masks it."""
    signature, spec = BUILTIN_LOSSES[name], LossSpec(name=name)
    draw = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logprobs = -4 * torch.rand(n, generator=draw)
    inputs = {key: 0.1 + torch.rand(n, generator=draw) for key in (*signature.required, *signature.optional)}
    masked = torch.randint(0, 2, (n,), generator=draw).bool()
    inputs[signature.masked_by[by % len(signature.masked_by)]][masked] = 0.0
    found = []
    for filled in (0.0, filler):
        if "logprobs" in inputs:
            inputs["logprobs"] = torch.where(masked, filled, logprobs + 0.1)
        found.append(both(spec, logprobs, inputs, lengths))
    (plain, fake), (there, here) = found
    assert (there.loss, there.metrics) == (plain.loss, plain.metrics) and torch.equal(there.gradient, plain.gradient)
    assert here == fake
    assert all(map(math.isfinite, (there.loss, *there.metrics.values(), *there.gradient.tolist())))
    assert all(map(math.isfinite, (here.loss, *here.metrics.values(), *here.slopes)))


@pytest.mark.parametrize("name", [name for name, each in BUILTIN_LOSSES.items() if "logprobs" in each.required])
def test_what_no_policy_gave_a_token_that_counts_is_not_finite(name: str) -> None:
    signature = BUILTIN_LOSSES[name]
    inputs = {key: torch.ones(4) for key in (*signature.required, *signature.optional)}
    inputs["logprobs"] = torch.tensor([-1.0, -99999.0, -1.0, -1.0])
    there, here = both(LossSpec(name=name), LOGPROBS, inputs, [4])
    for value in (there, here):
        assert not all(map(math.isfinite, (value.loss, *value.metrics.values())))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="`focal` is not one of cross_entropy"):
        registry.resolve(LossSpec(name="focal"))
    with pytest.raises(InvalidRequest, match="no setting `epsilon`"):
        registry.resolve(LossSpec(name="ppo", config={"epsilon": 0.2}))
    with pytest.raises(InvalidRequest, match="`clip_high_threshold` is not a finite number"):
        registry.resolve(LossSpec(name="ppo", config={"clip_high_threshold": math.inf}))
