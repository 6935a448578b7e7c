"""Random mixtures of adapters, sequences and losses in one pass: each tenant's gradient is PEFT's, in fp64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.hf_training import Bench, floats
from tests.support.peft_reference import Reference
from tests.support.rounding import ALGEBRA, relative
from tests.support.tiny_model import write_tiny_model
from tinkerbell.executors.hf import model as hf_model
from tinkerbell.losses.registry import resolve
from tinkerbell.types import Datum, LoraConfig, LossSpec

VOCAB = 64
TARGETS = [("all-linear",), ("attention",), ("mlp",), ("q_proj", "v_proj"), ("down_proj",), ("o_proj", "gate_proj")]
LOSSES = [
    LossSpec(),
    LossSpec(name="importance_sampling"),
    LossSpec(name="ppo", config={"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
    LossSpec(name="cispo"),
    LossSpec(name="dro", config={"beta": 0.3}),
    LossSpec(name="gspo", config={"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}),
]

TENANT = st.fixed_dictionaries(
    {
        "lora": st.builds(
            LoraConfig, rank=st.sampled_from([1, 3, 8, 16]), alpha=st.sampled_from([1, 7, 32]),
            targets=st.sampled_from(TARGETS),
        ),
        "lengths": st.lists(st.integers(1, 45), min_size=1, max_size=3),
        "loss": st.sampled_from(LOSSES),
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=VOCAB, hidden_size=32, intermediate_size=48)


@pytest.fixture(scope="module")
def model(directory: Path) -> hf_model.LoadedModel:
    return hf_model.load(str(directory), dtype="float64")


@settings(max_examples=12, deadline=None)
@given(tenants=st.lists(TENANT, min_size=1, max_size=4), pack_tokens=st.sampled_from([1, 64, 512]))
def test_each_gradient_is_pefts(
    model: hf_model.LoadedModel, directory: Path, tenants: list[dict[str, Any]], pack_tokens: int
) -> None:
    bench = Bench(model, pack_tokens=pack_tokens)
    rng = np.random.default_rng(0)
    units, data = [], []
    for number, tenant in enumerate(tenants):
        bench.add(str(number), tenant["lora"], number, b_scale=0.1)
        data.append([_datum(rng, length, tenant["loss"]) for length in tenant["lengths"]])
        units.append(bench.unit(str(number), data[-1], tenant["loss"]))
    for number, (tenant, answer) in enumerate(zip(tenants, bench.train(*units), strict=True)):
        loss = resolve(tenant["loss"])

        def loss_of(logprobs: torch.Tensor, inputs: dict[str, torch.Tensor], loss: Any = loss) -> torch.Tensor:
            wide = {name: x.double() for name, x in inputs.items()}
            return loss.function(logprobs, wide, loss.config, [len(logprobs)])[0]

        reference = Reference(directory, bench.adapters[str(number)], torch.float64)
        assert answer.loss == pytest.approx(reference.forward_backward(data[number], loss_of), rel=ALGEBRA, abs=ALGEBRA)
        expected = reference.gradient()
        if float(expected.norm()):
            assert relative(bench.gradient(str(number)), expected) < ALGEBRA
        else:
            # Every token was clipped.
            assert not bench.gradient(str(number)).any()


def _datum(rng: np.random.Generator, length: int, loss: LossSpec) -> Datum:
    tokens = rng.integers(0, VOCAB, length + 1).astype("<i4")
    inputs = {"weights": rng.uniform(0, 2, length)}
    if loss.name != "cross_entropy":
        inputs = {"logprobs": rng.uniform(-5, -3, length), "advantages": rng.normal(size=length)}
    if loss.name == "gspo":
        inputs["sequence_ratio_mask"] = rng.integers(0, 2, length).astype(float)
    return Datum(tokens[:-1].tobytes(), tokens[1:].tobytes(), {name: floats(x) for name, x in inputs.items()})
