"""Optimizer steps that cannot be taken leave weights, moments and step count as they were."""

import pytest
import torch

from tinkerbell.executors.hf import optimizer
from tinkerbell.executors.hf.adapter import Adapter, LinearShape
from tinkerbell.executors.hf.failures import NoGradients, NonFinite
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
