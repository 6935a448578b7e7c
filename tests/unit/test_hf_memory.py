"""Fewer activations, kept or computed again: the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.hf_training import Bench, random_data
from tests.support.tiny_model import write_tiny_model
from tinkerbell.executors.hf import head, recompute, trainer
from tinkerbell.executors.hf import model as hf_model
from tinkerbell.executors.hf.memory import activation_bytes_per_token
from tinkerbell.executors.hf.packing import PACK_TOKENS
from tinkerbell.executors.hf.trainer import LEAST_TOKENS, Trainer
from tinkerbell.executors.port import ForwardBackwardDone, UnitFailed
from tinkerbell.types import LoraConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> hf_model.LoadedModel:
    return hf_model.load(str(write_tiny_model(tmp_path_factory.mktemp("model"))))


def bench(model: hf_model.LoadedModel, activation_bytes: int | None) -> Bench:
    made = Bench(model)
    made.trainer = Trainer(model.runtime, model.info, made.adapters, activation_bytes=activation_bytes)
    for name in "ab":
        made.add(name, LoraConfig(rank=4, targets=("all-linear", "unembed")), ord(name), b_scale=0.05)
    return made


def results(made: Bench, model: hf_model.LoadedModel) -> list[Any]:
    units = [made.unit(name, random_data(ord(name), (70, 100), model.info.vocab_size)) for name in "ab"]
    return [*made.train(*units), *(made.gradient(name).numpy().tobytes() for name in "ab")]


def test_a_budget_changes_no_bit(model: hf_model.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    honest = recompute.checkpoint
    monkeypatch.setattr(recompute, "checkpoint", lambda *args, **kwargs: seen.append(1) or honest(*args, **kwargs))
    expected = results(bench(model, None), model)
    assert not seen
    assert results(bench(model, 1), model) == expected
    # Two layers, each of two packs by itself.
    assert len(seen) == 4
    roomy = 1000 * activation_bytes_per_token(model.runtime)
    assert results(bench(model, roomy), model) == expected and len(seen) == 4


def test_a_budget_cuts_packs_before_it_costs_time(model: hf_model.LoadedModel) -> None:
    per_token = activation_bytes_per_token(model.runtime)
    for tokens, expected in ((300, 300), (50, LEAST_TOKENS), (10_000, PACK_TOKENS)):
        assert bench(model, tokens * per_token).trainer._pack_tokens == expected


def test_the_count_of_activations_is_about_what_a_pass_keeps(model: hf_model.LoadedModel) -> None:
    """Against the inputs and outputs of the linear layers, which are most of it."""
    per_token = activation_bytes_per_token(model.runtime)
    layers = [s for name, s in model.runtime.shapes.items() if name != model.runtime.head.name]
    assert sum(s.in_features for s in layers) * 4 < per_token < sum(s.in_features + s.out_features for s in layers) * 12


def test_where_memory_does_not_suffice_a_lone_request_is_tried_with_less(
    model: hf_model.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench(model, None)
    unit = made.unit("a", random_data(1, (30,), model.info.vocab_size))
    (expected,) = made.train(unit)
    honest, passes = head.target_logprobs, []

    def scarce(runtime: Any, hidden: torch.Tensor, targets: torch.Tensor, plan: Any, observer: Any) -> torch.Tensor:
        passes.append(plan.recompute)
        if not plan.recompute:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return honest(runtime, hidden, targets, plan, observer)

    monkeypatch.setattr(trainer, "target_logprobs", scarce)
    (answer,) = made.trainer.run([unit])
    assert isinstance(answer, ForwardBackwardDone) and answer == expected and passes == [False, True]
    (forward,) = made.trainer.run([made.unit("a", random_data(1, (30,), model.info.vocab_size), backward=False)])
    assert isinstance(forward, UnitFailed) and passes == [False, True, False]


def test_a_model_without_such_layers_is_refused(model: hf_model.LoadedModel, tmp_path: Path) -> None:
    from tinkerbell.errors import InvalidRequest

    with pytest.raises(InvalidRequest, match="computed again"):
        recompute.make_recomputable(torch.nn.Linear(2, 2), model.runtime)
