"""Optimizer steps: what they compute, alone and in one call, and that those that cannot be taken change nothing."""

from collections.abc import Sequence

import pytest
import torch

from tests.support.peft_reference import adamw_steps
from tests.support.rounding import assert_missed_like
from tinkerbell.executors.hf import optimizer
from tinkerbell.executors.hf.adapter import Adapter, LinearShape, target_shapes
from tinkerbell.executors.hf.failures import NoGradients, NonFinite
from tinkerbell.executors.port import OptimStep, OptimStepDone, UnitFailed
from tinkerbell.types import AdamParams, LoraConfig

SHAPES = {"model.q_proj": LinearShape(8, 6)}


@pytest.fixture
def adapter() -> Adapter:
    made = Adapter(LoraConfig(rank=2), SHAPES, torch.float32, torch.device("cpu"))
    made.initialise(1)
    return made


def give_gradient(adapter: Adapter, value: float) -> None:
    adapter.gradient = adapter.new_buffer()
    adapter.gradient.flat.fill_(value)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30], ids=["inf", "nan", "square overflows"])
def test_a_bad_gradient_is_dropped_and_changes_nothing(adapter: Adapter, value: float) -> None:
    give_gradient(adapter, 0.5)
    optimizer.step(adapter, AdamParams())
    before = adapter.digest()
    give_gradient(adapter, value)
    with pytest.raises(NonFinite, match="dropped"):
        optimizer.step(adapter, AdamParams())
    assert adapter.digest() == before
    with pytest.raises(NoGradients):
        optimizer.step(adapter, AdamParams())
    give_gradient(adapter, 0.5)
    assert optimizer.step(adapter, AdamParams()) == pytest.approx(0.5 * adapter.layout.num_parameters**0.5)


def test_weights_that_would_overflow_are_kept(adapter: Adapter) -> None:
    adapter.weights.flat.fill_(3e38)
    before = adapter.digest()
    give_gradient(adapter, 1.0)
    with pytest.raises(NonFinite, match="weights that are not finite"):
        optimizer.step(adapter, AdamParams(learning_rate=10, weight_decay=10))
    assert adapter.digest() == before


LAYERS = {
    "model.0.q_proj": LinearShape(40, 24),
    "model.0.down_proj": LinearShape(72, 40),
    "model.1.q_proj": LinearShape(40, 24),
}
CYCLE = {
    "small": (LoraConfig(rank=2, targets=("q_proj",)), AdamParams(learning_rate=1e-2)),
    "clipped": (LoraConfig(rank=8, targets=("q_proj", "down_proj")), AdamParams(grad_clip_norm=0.5)),
    "decayed": (
        LoraConfig(rank=16, targets=("q_proj", "down_proj")),
        AdamParams(learning_rate=3e-3, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.1),
    ),
    "like small": (LoraConfig(rank=5, targets=("down_proj",)), AdamParams(learning_rate=1e-2)),
}
"""Two of them have the same settings, so they go through one call."""


def crowd() -> dict[str, Adapter]:
    made = {}
    for seed, (name, (lora, _)) in enumerate(CYCLE.items()):
        made[name] = Adapter(lora, target_shapes(lora, LAYERS), torch.float32, torch.device("cpu"))
        made[name].initialise(seed)
    return made


def give_random_gradient(adapter: Adapter, seed: int) -> None:
    adapter.gradient = adapter.new_buffer()
    adapter.gradient.flat.normal_(generator=torch.Generator().manual_seed(seed))


def trained(order: Sequence[str], *, together: bool, poisoned: str | None = None) -> dict[str, tuple[str, list[float]]]:
    """Digest and gradient norms after three steps; the poisoned adapter's second gradient has a NaN."""
    adapters = crowd()
    norms: dict[str, list[float]] = {name: [] for name in order}
    for step in range(3):
        for number, name in enumerate(CYCLE):
            give_random_gradient(adapters[name], 10 * step + number)
            if name == poisoned and step == 1:
                gradient = adapters[name].gradient
                assert gradient is not None
                gradient.flat[-1] = float("nan")
        cycle = [(adapters[name], CYCLE[name][1]) for name in order]
        for part in [cycle] if together else [[pair] for pair in cycle]:
            names = order if together else [next(n for n in order if adapters[n] is part[0][0])]
            for name, outcome in zip(names, optimizer.steps(part), strict=True):
                if name == poisoned and step == 1:
                    assert isinstance(outcome, NonFinite)
                else:
                    assert isinstance(outcome, float)
                    norms[name].append(outcome)
    return {name: (adapters[name].digest(), norms[name]) for name in order}


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_in_one_call_have_the_bits_of_steps_one_by_one(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = trained(list(CYCLE), together=False)
        assert len({digest for digest, _ in alone.values()}) == len(CYCLE)
        assert trained(list(CYCLE), together=True) == alone
        assert trained(list(reversed(CYCLE)), together=True) == alone
        with_a_nan = trained(list(CYCLE), together=True, poisoned="like small")
        assert {name: with_a_nan[name] for name in ("small", "clipped", "decayed")} == {
            name: alone[name] for name in ("small", "clipped", "decayed")
        }
        assert with_a_nan["like small"][0] != alone["like small"][0], "a step was left out"
    finally:
        torch.set_num_threads(before)


def test_an_overflow_is_taken_back_for_that_adapter_alone() -> None:
    adam = AdamParams(learning_rate=10, weight_decay=10)
    pair = [crowd()["small"] for _ in range(3)]
    pair[1].weights.flat.fill_(3e38)
    for adapter in pair:
        give_random_gradient(adapter, 1)
    kept = pair[1].digest()
    outcomes = optimizer.steps([(adapter, adam) for adapter in pair])
    assert isinstance(outcomes[1], NonFinite) and pair[1].digest() == kept
    assert outcomes[0] == outcomes[2] and pair[0].digest() == pair[2].digest() and pair[0].step == 1


def test_steps_are_those_of_torch_adamw() -> None:
    for name, adapter in crowd().items():
        _, adam = CYCLE[name]
        start, gradients = adapter.weights.flat.clone(), []
        for step in range(3):
            give_random_gradient(adapter, step)
            assert adapter.gradient is not None
            gradients.append(adapter.gradient.flat.clone())
            optimizer.step(adapter, adam)
        rounded, exact = (adamw_steps(adam, start.to(dtype), gradients) for dtype in (torch.float32, torch.float64))
        assert_missed_like(*(end.double() - start.double() for end in (adapter.weights.flat, rounded, exact)), name)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 300_000])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e15, 1e25], ids=str)
def test_gradient_norm(size: int, scale: float) -> None:
    """As good as torch's own in fp32 where that can be computed: with numbers of about 1."""
    unit = torch.randn(size, generator=torch.Generator().manual_seed(size))
    gradient = unit * scale
    assert_missed_like([optimizer.gradient_norm(gradient)], [scale * float(unit.norm())], [gradient.double().norm()])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1500, 2047, 2050])
def test_the_norm_of_what_is_not_finite_is_not_finite(value: float, place: int) -> None:
    gradient = torch.ones(2051)
    gradient[place] = value
    assert not optimizer.gradient_norm(gradient) < float("inf")


def test_a_gradient_within_the_bound_is_not_scaled() -> None:
    """Multiplying by 1 would be harmless; multiplying by almost 1 would not be the step that was asked for."""
    free, bound = crowd()["small"], crowd()["small"]
    for adapter in (free, bound):
        give_random_gradient(adapter, 3)
    norm = optimizer.step(free, AdamParams())
    optimizer.step(bound, AdamParams(grad_clip_norm=norm + 1e-3))
    assert free.digest() == bound.digest()


@pytest.mark.parametrize("threads", [1, 2])
def test_answers_of_a_cycle(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        adapters = crowd()
        for name in ("small", "decayed"):
            give_random_gradient(adapters[name], 1)
        names = ["decayed", "nobody", "clipped", "small", "small"]
        units = [OptimStep(request=7 - i, adapter=name, adam=AdamParams()) for i, name in enumerate(names)]
        answers = optimizer.run(units, adapters)
    finally:
        torch.set_num_threads(before)
    assert [answer.request for answer in answers] == [7, 6, 5, 4, 3]
    kinds = [answer.code if isinstance(answer, UnitFailed) else "done" for answer in answers]
    assert kinds == ["done", "not-found", "no-gradients", "done", "no-gradients"]
    fresh = crowd()["small"]
    give_random_gradient(fresh, 1)
    assert fresh.gradient is not None
    assert answers[3].gradient_digest == fresh.gradient.digest() != answers[0].gradient_digest
    for place, name in ((0, "decayed"), (3, "small")):
        answer = answers[place]
        assert isinstance(answer, OptimStepDone)
        assert (answer.step, answer.state_digest) == (1, adapters[name].digest())
        assert answer.weights_digest == adapters[name].weights.digest()
