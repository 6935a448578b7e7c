"""The HF executor against PEFT + torch.optim.AdamW on the real 135M model, fp32.

What is compared to what. An fp32 reference is itself rounded, so ours is compared to PEFT in fp64, and may miss it by
what PEFT in fp32 misses it by, times a factor: one adapter at a time, one sequence at a time, no padding. All three
train freely for five steps; every loss and every gradient is compared, and those of the fifth step again with both
references set to our weights. (AdamW divides by the gradient's own size, so along free trajectories rounding of an
element near zero becomes a full-size difference of its weight.) The optimizer is compared by giving torch.optim.AdamW
our gradients.
"""

import pytest
import torch

from tests.support.hf_training import Bench, random_data, sequence
from tests.support.peft_reference import Reference, adamw_steps
from tests.support.real_model import real_model_directory
from tests.support.rounding import assert_missed_like, assert_sum_missed_like
from tinkerbell.executors.hf import model as hf_model
from tinkerbell.types import AdamParams, Datum, LoraConfig

pytestmark = pytest.mark.model

ADAPTERS = {
    "qv": (LoraConfig(rank=8, alpha=16, targets=("q_proj", "v_proj")), AdamParams(learning_rate=1e-3)),
    "all": (LoraConfig(rank=16, alpha=32, targets=("all-linear",)), AdamParams(learning_rate=3e-4, weight_decay=0.1)),
    "odd": (
        LoraConfig(rank=5, alpha=7, targets=("o_proj", "mlp")),
        AdamParams(learning_rate=1e-3, beta1=0.8, beta2=0.99, grad_clip_norm=1.0),
    ),
}

TEXTS = {
    "qv": [
        "The forward pass reads every token once, and the backward pass reads it again.",
        "Rain fell on the harbour all night; by morning the boats had been moved to the inner quay.",
    ],
    "all": ["def add(a, b):\n    return a + b\n", "Water boils at one hundred degrees Celsius at sea level."],
    "odd": ["Once upon a time there was a lighthouse keeper who collected the names of passing ships."],
}

DTYPES = (torch.float32, torch.float64)


@pytest.fixture(scope="module")
def model() -> hf_model.LoadedModel:
    return hf_model.load(str(real_model_directory()))


@pytest.fixture(scope="module")
def data() -> dict[str, list[Datum]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(real_model_directory()))
    found: dict[str, list[Datum]] = {}
    for name, texts in TEXTS.items():
        found[name] = []
        for text in texts:
            tokens = tokenizer(text)["input_ids"]
            masked = (len(tokens) - 1) // 4
            weights = [0.0] * masked + [1.0] * (len(tokens) - 1 - masked)
            found[name].append(sequence(tokens, weights=weights))
    return found


def test_five_steps_in_one_batch_equal_peft_alone(model: hf_model.LoadedModel, data: dict[str, list[Datum]]) -> None:
    bench = Bench(model)
    for seed, (name, (lora, _)) in enumerate(ADAPTERS.items()):
        bench.add(name, lora, seed)
    weights = {name: [bench.adapters[name].weights.flat.clone()] for name in ADAPTERS}
    losses: dict[str, list[float]] = {name: [] for name in ADAPTERS}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in ADAPTERS}
    for _ in range(5):
        answers = bench.train(*(bench.unit(name, data[name]) for name in ADAPTERS))
        for (name, (_, adam)), answer in zip(ADAPTERS.items(), answers, strict=True):
            losses[name].append(answer.loss)
            gradients[name].append(bench.gradient(name).clone())
            bench.step(name, adam)
            weights[name].append(bench.adapters[name].weights.flat.clone())

    for seed, (name, (lora, adam)) in enumerate(ADAPTERS.items()):
        fresh = Bench(model).add(name, lora, seed)
        references = [Reference(real_model_directory(), fresh, dtype, adam) for dtype in DTYPES]
        for step in range(5):
            assert_alike(references, data[name], losses[name][step], gradients[name][step], f"{name}, step {step}")
            for reference in references:
                reference.step()
        assert losses[name][4] < losses[name][0]
        for reference in references:
            reference.set_weights(weights[name][4])
        assert_alike(references, data[name], losses[name][4], gradients[name][4], f"{name}, step 4 at our weights")
        assert_steps_are_torch_adamw(adam, weights[name], gradients[name])


def assert_alike(
    references: list[Reference], data: list[Datum], loss: float, gradient: torch.Tensor, what: str
) -> None:
    """Our loss and gradient on the data, and those of PEFT with its present weights."""
    rounded, exact = references
    for reference in references:
        reference.forward_backward(data)
    assert_sum_missed_like(loss, rounded.terms, exact.terms, f"loss of {what}")
    assert_missed_like(gradient, rounded.gradient(), exact.gradient(), f"gradient of {what}")


def assert_steps_are_torch_adamw(adam: AdamParams, weights: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    """Given the same gradients, as many steps of torch.optim.AdamW make the same change."""
    rounded, exact = (adamw_steps(adam, weights[0].to(dtype), gradients) for dtype in DTYPES)
    assert_missed_like(*(each.double() - weights[0].double() for each in (weights[-1], rounded, exact)))


def test_bits_do_not_depend_on_company(model: hf_model.LoadedModel) -> None:
    """Three steps on the real model: logprobs, loss, gradient and weights, alone and in two orders."""
    lengths = {"qv": (19, 33), "all": (41,), "odd": (7, 12)}

    def run(order: tuple[str, ...]) -> dict[str, list[object]]:
        bench = Bench(model)
        seen: dict[str, list[object]] = {name: [] for name in order}
        for name in order:
            bench.add(name, ADAPTERS[name][0], seed=len(name))
        for step in range(3):
            units = [
                bench.unit(name, random_data(step * 10 + len(name) + ord(name[0]), lengths[name], 49152))
                for name in order
            ]
            for name, answer in zip(order, bench.train(*units), strict=True):
                seen[name] += [answer.loss, answer.logprobs, bench.gradient(name).numpy().tobytes()]
                bench.step(name, ADAPTERS[name][1])
                seen[name].append(bench.adapters[name].digest())
        return seen

    alone = run(("qv",))["qv"]
    for order in (("qv", "all", "odd"), ("odd", "all", "qv")):
        assert run(order)["qv"] == alone
