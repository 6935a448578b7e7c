"""Which adapters are on the device. Two names of one CPU stand for the host and the device."""

import pytest
import torch

from tinkerbell.executors.hf.adapter import Adapter, LinearShape
from tinkerbell.executors.hf.placement import HOST, Adapters
from tinkerbell.types import LoraConfig

DEVICE = torch.device("cpu", 0)
SHAPES = {"layer": LinearShape(8, 4)}


def adapter(seed: int) -> Adapter:
    made = Adapter(LoraConfig(rank=2), SHAPES, torch.float32, DEVICE)
    made.initialise(seed)
    return made


def filled(number: int, budget: int | None) -> Adapters:
    """`budget`: in adapters."""
    adapters = Adapters(DEVICE, None if budget is None else budget * adapter(0).num_bytes)
    for seed in range(number):
        adapters[f"ad_{seed}"] = adapter(seed)
        adapters.bring([f"ad_{seed}"])
    return adapters


def on_device(adapters: Adapters) -> set[str]:
    return {name for name, value in adapters.items() if value.device == DEVICE}


def test_those_used_last_stay_on_the_device() -> None:
    adapters = filled(5, budget=3)
    assert on_device(adapters) == {"ad_2", "ad_3", "ad_4"}
    adapters.bring(["ad_2"])
    adapters.bring(["ad_0"])
    assert on_device(adapters) == {"ad_0", "ad_2", "ad_4"}


def test_what_is_wanted_together_is_there_together_even_over_the_budget() -> None:
    adapters = filled(5, budget=2)
    adapters.bring(["ad_0", "ad_1", "ad_2", "ad_nobodys"])
    assert on_device(adapters) == {"ad_0", "ad_1", "ad_2"}
    adapters.bring(["ad_4"])
    assert on_device(adapters) == {"ad_2", "ad_4"}


def test_gradients_count_and_move_along() -> None:
    adapters = filled(2, budget=2)
    first = adapters["ad_0"]
    first.gradient = first.new_buffer()
    first.gradient.flat.fill_(3.0)
    adapters.bring(["ad_1"])
    assert on_device(adapters) == {"ad_1"}
    assert bool((first.gradient.flat == 3.0).all())


def test_an_adapter_comes_back_as_it_was() -> None:
    adapters = filled(3, budget=1)
    moved = adapters["ad_0"]
    assert moved.device == HOST
    assert moved.digest() == adapter(0).digest()
    for pair in moved.weights.pairs.values():
        assert pair.A.untyped_storage().data_ptr() == moved.weights.flat.untyped_storage().data_ptr()
    adapters.bring(["ad_0"])
    assert moved.device == DEVICE and moved.digest() == adapter(0).digest()


def test_a_removed_adapter_takes_no_room() -> None:
    adapters = filled(3, budget=3)
    del adapters["ad_0"]
    adapters["ad_3"] = adapter(3)
    adapters.bring(["ad_3"])
    assert on_device(adapters) == {"ad_1", "ad_2", "ad_3"}


@pytest.mark.parametrize("number", [1, 20])
def test_without_a_budget_nothing_moves(number: int) -> None:
    assert len(on_device(filled(number, budget=None))) == number
