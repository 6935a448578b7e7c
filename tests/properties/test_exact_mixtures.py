"""Random tenants, neighbours, orders, arrival times and packs: each tenant's bits are those it has alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.executor_driver import ADAM
from tests.support.hf_training import Bench, random_data, soft_data
from tests.support.tiny_model import write_tiny_model
from tinkerbell.executors.hf import model as hf_model
from tinkerbell.types import LoraConfig, LossSpec

STEPS = 3
LOSSES = {
    "cross_entropy": ("weights",),
    "soft": ("weights",),
    "importance_sampling": ("logprobs", "advantages"),
    "ppo": ("logprobs", "advantages"),
    "cispo": ("logprobs", "advantages"),
    "dro": ("logprobs", "advantages"),
    "gspo": ("logprobs", "advantages", "sequence_ratio_mask"),
}
TARGETS = ["q_proj", "v_proj", "o_proj", "mlp", "attention", "all-linear", "unembed"]


@dataclass(frozen=True)
class Tenant:
    """What one tenant does: in each step some requests, then an optim_step."""

    lora: LoraConfig
    loss: str
    seed: int
    requests: tuple[tuple[int, ...], ...]
    """For each request of a step the lengths of its data."""

    @property
    def spec(self) -> LossSpec:
        return LossSpec(name="cross_entropy" if self.loss == "soft" else self.loss)


lengths = st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple)
loras = st.builds(
    LoraConfig,
    rank=st.integers(1, 9),
    alpha=st.sampled_from([1.0, 7.0, 32.0]),
    targets=st.lists(st.sampled_from(TARGETS), min_size=1, max_size=2, unique=True).map(tuple),
)
tenants = st.builds(
    Tenant,
    lora=loras,
    loss=st.sampled_from(sorted(LOSSES)),
    seed=st.integers(0, 1000),
    requests=st.lists(lengths, min_size=1, max_size=3).map(tuple),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> hf_model.LoadedModel:
    odd = {"hidden_size": 36, "intermediate_size": 51, "num_attention_heads": 2, "num_key_value_heads": 1}
    directory: Path = tmp_path_factory.mktemp("mixtures")
    return hf_model.load(str(write_tiny_model(directory, vocab_size=203, **odd)))


def work(tenant: Tenant, step: int, vocab_size: int) -> list[list[Any]]:
    """The data of each request of a step, with what its loss reads."""
    found = []
    for number, each in enumerate(tenant.requests):
        if tenant.loss == "soft":
            found.append(soft_data(1000 * tenant.seed + 10 * step + number, each, vocab_size, 2 + tenant.seed % 7))
            continue
        data = random_data(1000 * tenant.seed + 10 * step + number, each, vocab_size, weights=False)
        for datum in data:
            draw = torch.Generator().manual_seed(tenant.seed + datum.num_tokens)
            for name in LOSSES[tenant.loss]:
                values = torch.rand(datum.num_tokens, generator=draw) - (5.0 if name == "logprobs" else 0.25)
                datum.loss_inputs[name] = values.numpy().astype("<f4").tobytes()
        found.append(data)
    return found


def run(
    model: hf_model.LoadedModel, company: dict[str, Tenant], pack_tokens: int, late: frozenset[str]
) -> dict[str, Any]:
    """What each tenant of the company gets to see. The requests of those that are `late` run in a pass of their own."""
    bench = Bench(model, pack_tokens=pack_tokens)
    seen: dict[str, list[Any]] = {name: [] for name in company}
    for name, tenant in company.items():
        bench.add(name, tenant.lora, tenant.seed, b_scale=0.05)
    for step in range(STEPS):
        passes: list[list[tuple[str, Any]]] = [[], []]
        for name, tenant in company.items():
            for data in work(tenant, step, model.info.vocab_size):
                unit = bench.unit(name, data, tenant.spec)
                passes[name in late].append((name, unit))
        for together in passes:
            answers = bench.train(*(unit for _, unit in together))
            for (name, _), answer in zip(together, answers, strict=True):
                seen[name].append((answer.loss, answer.metrics, answer.logprobs))
        for name in company:
            seen[name].append((bench.gradient(name).numpy().tobytes(), bench.step(name, ADAM)))
            seen[name].append(bench.adapters[name].digest())
    return seen


@pytest.mark.parametrize("threads", [1, 2])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mine=tenants,
    others=st.lists(tenants, min_size=1, max_size=4),
    place=st.integers(0, 4),
    pack_tokens=st.integers(1, 400),
    late=st.sets(st.integers(0, 4)),
)
def test_a_tenant_gets_the_same_bits_alone_and_among_any_others(
    model: hf_model.LoadedModel,
    threads: int,
    mine: Tenant,
    others: list[Tenant],
    place: int,
    pack_tokens: int,
    late: set[int],
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        names = [f"other{number}" for number in range(len(others))]
        company = dict(zip(names, others, strict=True))
        order = [*names[:place], "mine", *names[place:]]
        alone = run(model, {"mine": mine}, 1024, frozenset())["mine"]
        together = {name: company.get(name, mine) for name in order}
        found = run(model, together, pack_tokens, frozenset(order[n] for n in late if n < len(order)))
        assert found["mine"] == alone
    finally:
        torch.set_num_threads(before)
