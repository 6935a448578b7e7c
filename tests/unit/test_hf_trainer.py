"""The HF executor's training side against PEFT and torch, on a tiny random model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.hf_training import Bench, floats, ints, logprobs, random_data, sequence, soft_data
from tests.support.peft_reference import Reference
from tests.support.rounding import ALGEBRA, CLOSE, assert_missed_like, assert_sum_missed_like, relative
from tests.support.tiny_model import write_tiny_model
from tinkerbell.executors.hf import model as hf_model
from tinkerbell.executors.port import ForwardBackward, ForwardBackwardDone, UnitFailed
from tinkerbell.types import AdamParams, Datum, LoraConfig, LossSpec

ADAPTERS = {
    "qv": (LoraConfig(rank=8, alpha=16, targets=("q_proj", "v_proj")), AdamParams(learning_rate=1e-2)),
    "all": (
        LoraConfig(rank=16, alpha=32, targets=("all-linear",)),
        AdamParams(learning_rate=3e-3, weight_decay=0.1, grad_clip_norm=0.5),
    ),
    "odd": (
        LoraConfig(rank=5, alpha=7, targets=("o_proj", "mlp")),
        AdamParams(learning_rate=5e-3, beta1=0.8, beta2=0.99, eps=1e-6),
    ),
    "head": (LoraConfig(rank=4, alpha=8, targets=("unembed",)), AdamParams(learning_rate=1e-2)),
    "both": (LoraConfig(rank=3, alpha=3, targets=("unembed", "attention")), AdamParams(learning_rate=1e-2)),
}
DTYPES = (torch.float32, torch.float64)
LENGTHS = {"qv": (9, 1, 14), "all": (30,), "odd": (5, 17), "head": (150,), "both": (12, 140)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(directory: Path) -> hf_model.LoadedModel:
    return hf_model.load(str(directory))


@pytest.fixture
def bench(model: hf_model.LoadedModel) -> Bench:
    return Bench(model)


@pytest.mark.parametrize("tied", [False, True])
def test_five_steps_in_company_equal_peft_alone_in_fp64(tmp_path: Path, tied: bool) -> None:
    """The algebra: fp64 on both sides, so that only a wrong formula can differ."""
    directory = write_tiny_model(tmp_path, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    bench = Bench(hf_model.load(str(directory), dtype="float64"))
    references = {}
    for seed, (name, (lora, adam)) in enumerate(ADAPTERS.items()):
        adapter = bench.add(name, lora, seed, b_scale=0.05)
        references[name] = Reference(directory, adapter, torch.float64, adam)
    for step in range(5):
        data = {name: random_data(step * 10 + i, LENGTHS[name], 257) for i, name in enumerate(ADAPTERS)}
        answers = bench.train(*(bench.unit(name, data[name]) for name in ADAPTERS))
        for name, answer in zip(ADAPTERS, answers, strict=True):
            reference = references[name]
            assert answer.loss == pytest.approx(reference.forward_backward(data[name]), rel=ALGEBRA)
            assert relative(bench.gradient(name), reference.gradient()) < ALGEBRA
            norm = bench.step(name, ADAPTERS[name][1])
            assert norm == pytest.approx(float(reference.gradient().norm()), rel=ALGEBRA)
            reference.step()
            assert relative(bench.adapters[name].weights.flat, reference.weights()) < ALGEBRA


def test_losses_of_logprobs_equal_peft_in_fp64(directory: Path) -> None:
    """Any loss is a row scaling in backward: checked with PPO through the whole model, clipped tokens included."""
    bench = Bench(hf_model.load(str(directory), dtype="float64"))
    lora = LoraConfig(rank=4, alpha=8, targets=("all-linear", "unembed"))
    reference = Reference(directory, bench.add("a", lora, 1, b_scale=0.05), torch.float64)
    rng = np.random.default_rng(0)
    data = []
    for datum in random_data(3, (8, 20), 257, weights=False):
        with torch.no_grad():
            now = reference.forward(datum).numpy()
        extra = {
            "logprobs": floats((now + rng.normal(0, 0.3, len(now))).tolist()),
            "advantages": floats(rng.normal(0, 1, len(now)).tolist()),
        }
        data.append(Datum(datum.tokens, datum.targets, extra))

    def ppo(logp: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        ratio = torch.exp(logp - inputs["logprobs"])
        return -torch.minimum(ratio * inputs["advantages"], ratio.clamp(0.8, 1.2) * inputs["advantages"]).sum()

    (answer,) = bench.train(bench.unit("a", data, LossSpec(name="ppo")))
    assert answer.loss == pytest.approx(reference.forward_backward(data, ppo), rel=ALGEBRA)
    assert relative(bench.gradient("a"), reference.gradient()) < ALGEBRA
    assert 0 < answer.metrics["clipped_sum"] < answer.metrics["num_tokens"] == 28


@pytest.mark.parametrize("targets", [("all-linear",), ("all-linear", "unembed")])
@pytest.mark.parametrize("num_targets", [2, 37])
def test_several_targets_of_a_token_equal_peft_in_fp64(
    directory: Path, targets: tuple[str, ...], num_targets: int
) -> None:
    """More of them than fit into one part of the vocabulary's sweep, and the same one twice."""
    bench = Bench(hf_model.load(str(directory), dtype="float64"))
    reference = Reference(
        directory, bench.add("a", LoraConfig(rank=4, targets=targets), 1, b_scale=0.05), torch.float64
    )
    bench.add("b", ADAPTERS["qv"][0], 2, b_scale=0.05)
    data = soft_data(5, (40, 3, 1), 257, num_targets)
    data.append(Datum(ints([5, 6]), ints([9] * 2 * num_targets), {"weights": floats([0.5] * 2 * num_targets)}))
    one = random_data(4, (11,), 257)
    before, answer, after = bench.train(bench.unit("b", one), bench.unit("a", data), bench.unit("b", one))
    assert [len(raw) for raw in answer.logprobs] == [len(datum.targets) for datum in data]
    assert answer.loss == pytest.approx(reference.forward_backward(data), rel=ALGEBRA)
    assert relative(bench.gradient("a"), reference.gradient()) < ALGEBRA
    assert before.logprobs == after.logprobs


def test_what_several_targets_cannot_be(bench: Bench) -> None:
    bench.add("a", ADAPTERS["qv"][0], 1)
    good = soft_data(1, (3,), 257, 2)
    assert "as many targets" in failure(bench, bench.unit("a", good + soft_data(1, (3,), 257, 3))).message
    inputs = dict.fromkeys(("logprobs", "advantages"), good[0].loss_inputs["weights"])
    policy = [Datum(good[0].tokens, good[0].targets, inputs)]
    assert "6 targets" in failure(bench, bench.unit("a", policy, LossSpec(name="ppo"))).message
    short = [Datum(good[0].tokens, good[0].targets, {"weights": floats([1.0] * 3)})]
    assert "6 targets but 3 numbers" in failure(bench, bench.unit("a", short)).message
    assert bench.adapters["a"].gradient is None


def test_forward_only_gives_the_same_bits_and_no_gradient(bench: Bench) -> None:
    bench.add("a", ADAPTERS["both"][0], 1, b_scale=0.05)
    data = random_data(0, (33, 140), 257)
    with_gradient, without = bench.train(bench.unit("a", data), bench.unit("a", data, backward=False))
    assert with_gradient.logprobs == without.logprobs
    assert with_gradient.loss == without.loss
    first = bench.gradient("a").clone()
    bench.train(bench.unit("a", data, backward=False))
    assert torch.equal(bench.gradient("a"), first)


def test_logprobs_are_those_of_the_targets_given(bench: Bench, directory: Path) -> None:
    """Nothing is shifted: targets may be anything."""
    from transformers import AutoModelForCausalLM

    bench.add("a", ADAPTERS["qv"][0], 1)
    tokens, targets = [5, 6, 7, 8], [200, 6, 1, 0]
    (answer,) = bench.train(bench.unit("a", [Datum(ints(tokens), ints(targets), {})]))
    rounded, exact = (
        torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)[range(4), targets].detach()
        for model in (AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype) for dtype in DTYPES)
    )
    assert_missed_like(logprobs(answer), rounded, exact)
    assert_sum_missed_like(answer.loss, -rounded, -exact)
    assert answer.metrics == {"num_tokens": 4.0, "weight_sum": 4.0}


def test_chunks_of_a_request_add_up_to_it(bench: Bench) -> None:
    for name in ("whole", "chunks"):
        bench.add(name, ADAPTERS["all"][0], 1, b_scale=0.05)
    data = random_data(0, (20, 31, 12), 257)
    (whole,) = bench.train(bench.unit("whole", data))
    parts = [
        ForwardBackward(request=50, adapter="chunks", data=[datum], loss=LossSpec(), first=i == 0, last=i == 2)
        for i, datum in enumerate(data)
    ]
    first = bench.train(*parts[:2])
    assert bench.adapters["chunks"].gradient is None
    last = bench.train(parts[2])
    assert sum(answer.loss for answer in first + last) == pytest.approx(whole.loss, rel=CLOSE)
    assert relative(bench.gradient("chunks"), bench.gradient("whole")) < CLOSE


def failure(bench: Bench, unit: ForwardBackward) -> UnitFailed:
    (answer,) = bench.trainer.run([unit])
    assert isinstance(answer, UnitFailed)
    return answer


def test_a_failed_chunk_fails_its_request_and_leaves_nothing(bench: Bench) -> None:
    bench.add("a", ADAPTERS["all"][0], 1)
    good, bad = random_data(0, (6,), 257), [sequence([1, 2, 3], weights=[float("nan"), 1.0])]
    chunks = [
        ForwardBackward(request=9, adapter="a", data=data, loss=LossSpec(), first=i == 0, last=i == 2)
        for i, data in enumerate((good, bad, good))
    ]
    first, second, third = bench.trainer.run(chunks)
    assert isinstance(first, ForwardBackwardDone)
    assert isinstance(second, UnitFailed) and (second.category, second.code) == ("user", "non-finite")
    assert isinstance(third, UnitFailed) and (third.category, third.code) == ("user", "non-finite")
    assert "earlier chunk" in third.message
    assert bench.adapters["a"].gradient is None
    bench.train(bench.unit("a", good))
    assert bench.adapters["a"].gradient is not None


def test_a_chunk_without_its_beginning_fails(bench: Bench) -> None:
    bench.add("a", ADAPTERS["qv"][0], 1)
    answer = failure(bench, bench.unit("a", random_data(0, (6,), 257), first=False))
    assert (answer.category, answer.code) == ("server", "lost-chunk")


NAN = float("nan")


@pytest.mark.parametrize(
    ("data", "loss", "text"),
    [
        ([], LossSpec(), "no datum"),
        ([Datum(b"", b"", {})], LossSpec(), "at least one"),
        ([Datum(ints([1, 2]), ints([1]), {})], LossSpec(), "2 tokens but 1 targets"),
        ([Datum(ints([1, 257]), ints([1, 2]), {})], LossSpec(), "data[0].tokens: token 257"),
        ([Datum(ints([1, 2]), ints([1, -1]), {})], LossSpec(), "data[0].targets: token -1"),
        ([Datum(ints([1] * 513), ints([1] * 513), {})], LossSpec(), "at most 512"),
        ([sequence([1, 2, 3], weights=[1.0])], LossSpec(), "1 numbers in `weights`"),
        ([sequence([1, 2, 3], advantages=[1.0, 1.0])], LossSpec(), "does not read `advantages`"),
        ([sequence([1, 2, 3], logprobs=[0.0, 0.0])], LossSpec(name="ppo"), "needs `advantages`"),
        ([sequence([1, 2])], LossSpec(name="hinge"), "`hinge` is not one of"),
        ([sequence([1, 2])], LossSpec(config={"beta": 1.0}), "no setting `beta`"),
        ([sequence([1, 2])], LossSpec(name="ppo", config={"clip_low_threshold": NAN}), "not a finite number"),
    ],
)
def test_bad_data_is_the_callers_failure(bench: Bench, data: list[Datum], loss: LossSpec, text: str) -> None:
    bench.add("a", ADAPTERS["qv"][0], 1)
    answer = failure(bench, bench.unit("a", data, loss))
    assert (answer.category, answer.code) == ("user", "invalid-request")
    assert text in answer.message


def test_unknown_adapter(bench: Bench) -> None:
    answer = failure(bench, bench.unit("nobody", random_data(0, (6,), 257)))
    assert answer.code == "not-found"


def test_an_exception_in_one_micro_batch_fails_it_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pack is run again one by one; the answers of the others are those they have alone."""
    from tinkerbell.executors.hf import trainer

    for name in ("a", "b", "c"):
        bench.add(name, ADAPTERS["all"][0], 1, b_scale=0.05)
    data = {name: random_data(i, (9 + i,), 257) for i, name in enumerate("abc")}
    expected = [bench.train(bench.unit(name, data[name]))[0] for name in ("a", "c")]
    gradients = [bench.gradient(name).clone() for name in ("a", "c")]
    for name in ("a", "c"):
        bench.adapters[name].gradient = None
    real_plan = trainer.plan

    def broken_plan(pack: list[trainer.MicroBatch], *how: Any) -> object:
        if any(batch.unit.adapter == "b" for batch in pack):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real_plan(pack, *how)

    monkeypatch.setattr(trainer, "plan", broken_plan)
    a, b, c = bench.trainer.run([bench.unit(name, data[name]) for name in "abc"])
    assert isinstance(b, UnitFailed) and (b.category, b.code) == ("server", "out-of-memory")
    assert bench.adapters["b"].gradient is None
    for answer, alone in zip((a, c), expected, strict=True):
        assert isinstance(answer, ForwardBackwardDone) and answer.logprobs == alone.logprobs
    for name, gradient in zip(("a", "c"), gradients, strict=True):
        assert torch.equal(bench.gradient(name), gradient)
