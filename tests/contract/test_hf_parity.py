"""The HF executor against PEFT + torch.optim.AdamW on the real 135M model, fp32.

What is compared to what. An fp32 reference is itself rounded: HF's full-vocabulary log_softmax in fp32 puts PEFT's
own gradients 2e-5 to 6e-5 (relative, L2) away from the same computation in fp64. A bound of 1e-5 can therefore
only be stated against fp64: PEFT in fp64, one adapter at a time, one sequence at a time, no padding. Both train
freely for five steps and every loss is compared; gradients are compared at equal weights (the first step, and the
fifth with the reference set to our weights), and more loosely along the free trajectories; the optimizer is
compared by giving torch.optim.AdamW our gradients.
"""

import pytest
import torch

from tests.support.hf_training import Bench, random_data, sequence
from tests.support.peft_reference import Reference, relative
from tests.support.real_model import real_model_directory
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

BOUND = 1e-5
"""Relative, L2 norm, against fp64 at the same weights."""

DRIFT = 1e-4
"""Relative, free-running: AdamW divides by the gradient's own size, so rounding of an element near zero becomes
a full-size difference of its weight. PEFT in fp32 is about 1e-4 away from PEFT in fp64 after three steps here."""


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
        free = Reference(real_model_directory(), fresh, torch.float64, adam)
        for step in range(5):
            loss = free.forward_backward(data[name])
            assert losses[name][step] == pytest.approx(loss, rel=BOUND), (name, step)
            assert relative(gradients[name][step], free.gradient()) < (DRIFT if step else BOUND), (name, step)
            free.step()
        assert losses[name][4] < losses[name][0]
        free.set_weights(weights[name][4])
        assert losses[name][4] == pytest.approx(free.forward_backward(data[name]), rel=BOUND), name
        assert relative(gradients[name][4], free.gradient()) < BOUND, name
        assert_steps_are_torch_adamw(adam, weights[name], gradients[name])


def assert_steps_are_torch_adamw(adam: AdamParams, weights: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    """Given the same gradients, five steps of torch.optim.AdamW in fp64 make the same change."""
    parameter = torch.nn.Parameter(weights[0].double())
    optimizer = torch.optim.AdamW(
        [parameter], lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
    )
    for gradient in gradients:
        parameter.grad = gradient.double()
        if adam.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_([parameter], adam.grad_clip_norm)
        optimizer.step()
    assert relative(weights[-1] - weights[0], parameter.detach() - weights[0].double()) < BOUND


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
