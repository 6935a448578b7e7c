"""Families of models: several adapters in one pass against PEFT with one at a time, gradients included."""

from typing import Any

import pytest
import torch

from tests.support.hf_training import Bench, random_data
from tests.support.peft_reference import Reference
from tests.support.rounding import ALGEBRA, assert_missed_like, assert_sum_missed_like, relative
from tests.support.tiny_model import make
from tinkerbell.executors.hf import model as hf_model
from tinkerbell.types import LoraConfig

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 40}),
    "gemma": ("Gemma", {"head_dim": 16, "pad_token_id": 0}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "phi3-partial-rotary": ("Phi3", {"pad_token_id": 0, "partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2", {}),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_losses_are_those_of_peft(
    family: str, dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name, more = FAMILIES[family]
    directory = tmp_path_factory.mktemp(family)
    model = make(name, **more)
    _make_norms_count(model)
    model.save_pretrained(str(directory))
    loaded = hf_model.load(str(directory), dtype=dtype)
    attention = "qkv_proj" if name == "Phi3" else "q_proj"
    tenants = {
        "a": (LoraConfig(rank=4, alpha=8, targets=("all-linear",)), (7, 21)),
        "b": (LoraConfig(rank=3, alpha=5, targets=(attention, "o_proj")), (1, 12)),
        "c": (LoraConfig(rank=8, alpha=4, targets=("mlp",)), (33,)),
    }
    bench = Bench(loaded)
    data = {}
    for seed, (tenant, (lora, lengths)) in enumerate(tenants.items()):
        bench.add(tenant, lora, seed, b_scale=0.1)
        data[tenant] = random_data(seed, lengths, 64)
    answers = bench.train(*(bench.unit(tenant, data[tenant]) for tenant in tenants))
    for tenant, answer in zip(tenants, answers, strict=True):
        exact = Reference(directory, bench.adapters[tenant], torch.float64)
        loss = exact.forward_backward(data[tenant])
        if dtype == "float64":
            assert answer.loss == pytest.approx(loss, rel=ALGEBRA)
            assert relative(bench.gradient(tenant), exact.gradient()) < ALGEBRA, tenant
        else:
            rounded = Reference(directory, bench.adapters[tenant], torch.float32)
            rounded.forward_backward(data[tenant])
            assert_sum_missed_like(answer.loss, rounded.terms, exact.terms, tenant)
            assert_missed_like(bench.gradient(tenant), rounded.gradient(), exact.gradient(), tenant)


def _make_norms_count(model: Any) -> None:
    """With weights all one (or all zero, in the Gemma family) a mistake with them would not show."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.data += torch.empty(module.weight.shape).uniform_(-0.3, 0.3, generator=generator)
