"""Alone == among others, bit for bit: logprobs, loss, gradient, and weights after three steps."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.hf_training import Bench, random_data, sequence
from tests.support.rounding import CLOSE, relative
from tests.support.tiny_model import write_tiny_model
from tinkerbell.executors.hf import model as hf_model
from tinkerbell.executors.hf.gemm import Heights
from tinkerbell.executors.hf.packing import MicroBatch, micro_batch, packs
from tinkerbell.executors.port import ForwardBackward, ForwardBackwardDone, UnitFailed
from tinkerbell.types import AdamParams, LoraConfig

TENANTS = {
    "a": (LoraConfig(rank=8, alpha=16, targets=("q_proj", "v_proj")), (7, 1, 22)),
    "b": (LoraConfig(rank=16, alpha=32, targets=("all-linear", "unembed")), (131, 3)),
    "c": (LoraConfig(rank=5, alpha=7, targets=("o_proj", "mlp")), (1,)),
    "d": (LoraConfig(rank=3, alpha=3, targets=("unembed",)), (40,)),
}

SHAPES = {
    # Every row begins on a 64-byte boundary, every row is a whole number of vector registers.
    "round": {},
    # Neither: a kernel that looks at addresses, strides or remainders is found out here.
    "odd": {
        "hidden_size": 36, "intermediate_size": 51, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 203,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> hf_model.LoadedModel:
    directory: Path = tmp_path_factory.mktemp(request.param)
    return hf_model.load(str(write_tiny_model(directory, **SHAPES[request.param])))


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def run(
    model: hf_model.LoadedModel, order: tuple[str, ...], steps: int, pack_tokens: int = 1024
) -> dict[str, list[Any]]:
    """Everything each tenant of `order` gets to see, training together."""
    bench = Bench(model, pack_tokens=pack_tokens)
    seen: dict[str, list] = {name: [] for name in order}
    for name in order:
        bench.add(name, TENANTS[name][0], seed=ord(name), b_scale=0.05)
    vocab = model.info.vocab_size
    for step in range(steps):
        units = [bench.unit(n, random_data(step * 100 + ord(n), TENANTS[n][1], vocab)) for n in order]
        for name, answer in zip(order, bench.train(*units), strict=True):
            seen[name] += [answer.loss, answer.metrics, answer.logprobs, bench.gradient(name).numpy().tobytes()]
            bench.step(name, AdamParams(learning_rate=1e-2, weight_decay=0.1))
            seen[name].append(bench.adapters[name].digest())
    return seen


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("products", ["shared", "split"])
def test_bits_do_not_depend_on_company_or_order(
    model: hf_model.LoadedModel, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if products == "split":
        monkeypatch.setattr(Heights, "alike", lambda self: False)
    elif not model.runtime.heights.alike():
        pytest.skip("products over rows of several micro-batches change bits on this processor")
    alone = {name: run(model, (name,), 3)[name] for name in TENANTS}
    orders: list[tuple[str, ...]] = [*itertools.permutations(TENANTS, 4)][::5]
    orders += [("c", "b"), ("b", "a", "d"), ("d", "c", "a")]
    for order in orders:
        together = run(model, order, 3)
        for name in order:
            assert together[name] == alone[name], f"tenant {name} in {order}"


def test_bits_do_not_depend_on_longer_company_where_rotary_tables_do(tmp_path: Path) -> None:
    """longrope takes other frequencies as soon as it sees one position beyond the original context."""
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        vocab_size=203, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, original_max_position_embeddings=24, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, rope_parameters=rope | {"original_max_position_embeddings": 24},
    )  # fmt: skip
    torch.manual_seed(0)
    Phi3ForCausalLM(config).save_pretrained(str(tmp_path))
    loaded = hf_model.load(str(tmp_path))
    for exact in (True, False):
        bench = Bench(loaded, exact=exact)
        for name in ("short", "long"):
            bench.add(name, LoraConfig(rank=4, targets=("o_proj", "down_proj")), 1, b_scale=0.05)
        short = bench.unit("short", random_data(1, (10,), 203))
        (alone,) = bench.train(short)
        together = bench.train(short, bench.unit("long", random_data(2, (60,), 203)))[0]
        assert together == alone if exact else together.loss == pytest.approx(alone.loss, rel=CLOSE)


def test_a_fast_pass_differs_by_rounding_only(model: hf_model.LoadedModel) -> None:
    """Base products over a whole pack, LoRA, attention and losses as ever."""
    found: dict[bool, list[Any]] = {}
    for exact in (True, False):
        bench = Bench(model, exact=exact)
        for number, (name, (lora, _)) in enumerate(TENANTS.items()):
            bench.add(name, lora, number, b_scale=0.05)
        vocab = model.info.vocab_size
        answers = bench.train(*(bench.unit(n, random_data(ord(n), TENANTS[n][1], vocab)) for n in TENANTS))
        found[exact] = [(answer, bench.gradient(name).clone()) for answer, name in zip(answers, TENANTS, strict=True)]
    for (exact_answer, exact_gradient), (answer, gradient) in zip(found[True], found[False], strict=True):
        assert answer.loss == pytest.approx(exact_answer.loss, rel=CLOSE)
        assert relative(gradient, exact_gradient) < CLOSE


def test_packs_are_few_and_even(model: hf_model.LoadedModel) -> None:
    batches = [_batch(model, "b")] * 7
    assert [len(pack) for pack in packs(batches, 3 * 6)] == [6, 1]
    assert [len(pack) for pack in packs(batches, 3 * 600)] == [7]
    assert [len(pack) for pack in packs([_batch(model, "b", 24)] * 7, 24 * 6)] == [4, 3]
    assert [len(pack) for pack in packs(batches, 10_000, gradient_bytes=1)] == [1] * 7
    assert packs([]) == []


def _batch(model: hf_model.LoadedModel, name: str, num_tokens: int = 3) -> MicroBatch:
    bench = Bench(model)
    adapter = bench.add(name, TENANTS[name][0], 1)
    unit = bench.unit(name, random_data(1, (num_tokens,), model.info.vocab_size))
    return micro_batch(unit, adapter, model.info, model.runtime.device)


@pytest.mark.parametrize("pack_tokens", [1, 60, 150])
def test_bits_do_not_depend_on_packs(model: hf_model.LoadedModel, pack_tokens: int) -> None:
    assert run(model, tuple(TENANTS), 1, pack_tokens) == run(model, tuple(TENANTS), 1)


def test_two_requests_of_one_adapter_in_one_pack(model: hf_model.LoadedModel) -> None:
    """Whether two requests meet in a pack depends on load, so it must not matter."""
    vocab = model.info.vocab_size
    gradients = []
    for together in (True, False):
        bench = Bench(model)
        bench.add("a", TENANTS["b"][0], 1, b_scale=0.05)
        bench.add("z", TENANTS["a"][0], 2, b_scale=0.05)
        first, second = (bench.unit("a", random_data(i, (9 + i, 14), vocab)) for i in range(2))
        between = bench.unit("z", random_data(5, (11,), vocab))
        if together:
            bench.train(first, between, second)
        else:
            bench.train(first)
            bench.train(second)
        gradients.append(bench.gradient("a").clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("poison", ["weight", "inf-adapter", "nan-adapter"])
def test_a_nan_stays_with_its_tenant(model: hf_model.LoadedModel, poison: str) -> None:
    order = ("a", "bad", "b", "d")
    vocab = model.info.vocab_size
    bench = Bench(model)
    for name in order:
        bench.add(name, TENANTS.get(name, TENANTS["b"])[0], seed=len(name) + ord(name[0]), b_scale=0.05)
    units = {n: bench.unit(n, random_data(ord(n), TENANTS[n][1], vocab)) for n in order if n != "bad"}
    expected = {}
    for name, unit in units.items():
        (answer,) = bench.train(unit)
        expected[name] = (answer, bench.gradient(name).clone())
        bench.adapters[name].gradient = None
    bad = bench.adapters["bad"]
    if poison == "weight":
        data = [sequence([1, 2, 3, 4], weights=[1.0, float("nan"), 1.0])]
    else:
        data = random_data(1, (9, 4), vocab)
        bad.weights.flat[::7] = float("inf") if poison == "inf-adapter" else float("nan")
    before = bad.digest()
    answers = bench.trainer.run([bench.unit("bad", data), *units.values()])
    failure, others = answers[0], answers[1:]
    assert isinstance(failure, UnitFailed) and (failure.category, failure.code) == ("user", "non-finite")
    assert bad.gradient is None and bad.digest() == before
    for (name, (alone, gradient)), answer in zip(expected.items(), others, strict=True):
        assert answer == alone
        assert torch.equal(bench.gradient(name), gradient), name


def test_the_same_batch_twice(model: hf_model.LoadedModel) -> None:
    assert run(model, tuple(TENANTS), 2) == run(model, tuple(TENANTS), 2)


def test_gradients_are_those_of_the_whole_row_range(model: hf_model.LoadedModel) -> None:
    """The comparison above would also hold for gradients that are all zero."""
    bench = Bench(model)
    bench.add("b", TENANTS["b"][0], 1, b_scale=0.05)
    bench.train(bench.unit("b", random_data(0, (131, 3), model.info.vocab_size)))
    buffer = bench.adapters["b"].gradient
    assert buffer is not None
    for name, pair in buffer.pairs.items():
        assert float(pair.A.abs().min(dim=1).values.max()) > 0, name
        assert float(pair.B.abs().max()) > 0, name
    assert np.isfinite(bench.gradient("b").numpy()).all()


def test_answers_come_in_order(model: hf_model.LoadedModel) -> None:
    """Also where forward-only and training are mixed."""
    bench = Bench(model)
    bench.add("a", TENANTS["a"][0], 1)
    vocab = model.info.vocab_size
    units: list[ForwardBackward] = [
        bench.unit("a", random_data(i, (3 + i,), vocab), backward=bool(i % 2)) for i in range(6)
    ]
    answers = bench.trainer.run(units)
    assert [answer.request for answer in answers] == [unit.request for unit in units]
    assert [len(a.logprobs[0]) // 4 for a in answers if isinstance(a, ForwardBackwardDone)] == [3, 4, 5, 6, 7, 8]
