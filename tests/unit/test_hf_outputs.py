"""Entropy, logsumexp, the likeliest tokens and logits of a forward: right, and the same bits in any company."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from tests.support.hf_training import Bench, random_data
from tests.support.peft_reference import Reference
from tests.support.rounding import ALGEBRA, CLOSE, assert_missed_like
from tests.support.tiny_model import write_tiny_model
from tinkerbell.executors.hf import gemm, head
from tinkerbell.executors.hf import model as hf_model
from tinkerbell.executors.hf.gemm import Heights
from tinkerbell.executors.hf.head import Softmax
from tinkerbell.executors.hf.head_outputs import Rows, Sweep, largest
from tinkerbell.executors.port import ForwardBackwardDone, UnitFailed
from tinkerbell.types import Datum, DatumOutputs, LoraConfig, OutputSpec

ALL = OutputSpec(entropy=True, logsumexp=True, top_k=5, logits=True)
LORAS = {
    "below": LoraConfig(rank=4, alpha=8, targets=("q_proj", "mlp")),
    "on the head": LoraConfig(rank=4, alpha=8, targets=("all-linear", "unembed")),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    odd = {"hidden_size": 36, "intermediate_size": 51, "num_attention_heads": 2, "num_key_value_heads": 1}
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), vocab_size=203, **odd)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of the vocabulary, the last one short."""
    for module in (gemm, head):
        monkeypatch.setattr(module, "BLOCK", 64)


def forward(bench: Bench, *work: tuple[str, list[Datum], OutputSpec | None]) -> list[ForwardBackwardDone]:
    units = [msgspec.structs.replace(bench.unit(name, data, backward=False), outputs=spec) for name, data, spec in work]
    return bench.train(*units)


def array(raw: bytes | None, dtype: str = "<f4") -> np.ndarray:
    assert raw is not None
    return np.frombuffer(raw, dtype)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("where", LORAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_outputs_are_those_of_transformers_and_peft_in_fp64(directory: Path, where: str, dtype: str) -> None:
    bench = Bench(hf_model.load(str(directory), dtype=dtype))
    adapter = bench.add("a", LORAS[where], 1, b_scale=0.05)
    rounded, exact = (Reference(directory, adapter, each) for each in (torch.float32, torch.float64))
    data = random_data(3, (9, 1, 40), 203)
    (answer,) = forward(bench, ("a", data, ALL))
    assert answer.outputs is not None and len(answer.outputs) == 3
    for datum, found, logprobs in zip(data, answer.outputs, answer.logprobs, strict=True):
        tokens = torch.from_numpy(np.frombuffer(datum.tokens, "<i4").astype("int64"))
        with torch.no_grad():
            near, logits = (each.model(input_ids=tokens[None], use_cache=False).logits[0] for each in (rounded, exact))
        n = datum.num_tokens
        got = array(found.logits).reshape(n, 203)
        assert_missed_like(got, near, logits, "logits")
        entropies = (torch.distributions.Categorical(logits=each).entropy() for each in (near, logits))
        assert_missed_like(array(found.entropy), *entropies, "entropy")
        assert_missed_like(array(found.logsumexp), near.logsumexp(-1), logits.logsumexp(-1), "logsumexp")
        top = torch.log_softmax(logits, -1).topk(5)
        np.testing.assert_array_equal(array(found.top_tokens, "<i4").reshape(n, 5), top.indices.numpy())
        same = torch.log_softmax(near, -1).gather(1, top.indices)
        assert_missed_like(array(found.top_logprobs), same, top.values, "likeliest tokens")
        targets = np.frombuffer(datum.targets, "<i4")
        of_target = got[np.arange(n), targets] - array(found.logsumexp)
        np.testing.assert_allclose(of_target, array(logprobs), atol=CLOSE, rtol=0)


def sweep(z: torch.Tensor, spec: OutputSpec, block: int) -> Rows:
    """The outputs of logits [N, V], seen in blocks."""
    n, v = z.shape
    rows = Rows(0, n, spec, v, z)
    softmax, run = Softmax(torch.zeros(n, 1, dtype=torch.int64), n, z.dtype), Sweep([rows], 0, n)
    for first in range(0, v, block):
        end = min(first + block, v)
        run.take(softmax, first, end, z[:, first:end].clone())
    run.finish(softmax)
    return rows


@pytest.mark.parametrize("block", [7, 64, 1000])
@pytest.mark.parametrize("shift", [0.0, 3000.0, -3000.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 80.0])
def test_the_arithmetic_in_fp64(block: int, shift: float, scale: float) -> None:
    """Also where logits are far from zero, nearly equal, or nearly sure."""
    z = torch.randn(11, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale + shift
    rows = sweep(z, ALL, block)
    assert rows.entropy is not None and rows.logsumexp is not None and rows.logits is not None
    expected = torch.distributions.Categorical(logits=z).entropy()
    assert torch.allclose(rows.entropy, expected, rtol=ALGEBRA, atol=ALGEBRA)
    assert torch.allclose(rows.logsumexp, z.logsumexp(1), rtol=ALGEBRA, atol=0)
    assert torch.equal(rows.logits, z)


def test_entropy_in_fp32_does_not_suffer_from_large_logits() -> None:
    z = torch.randn(50, 5000, generator=torch.Generator().manual_seed(1)) + 500.0
    rows = sweep(z, OutputSpec(entropy=True), 2048)
    assert rows.entropy is not None
    # Taking 500 from such a number leaves nothing out, in fp32 either.
    small = torch.distributions.Categorical(logits=z - 500.0).entropy()
    assert_missed_like(rows.entropy, small, torch.distributions.Categorical(logits=z.double()).entropy())


def test_a_sure_thing_has_no_entropy() -> None:
    z = torch.full((2, 100), -1e4)
    z[0, 3] = z[1, 99] = 1e4
    rows = sweep(z, OutputSpec(entropy=True, top_k=2), 32)
    assert rows.entropy is not None and rows.entropy.tolist() == [0.0, 0.0]
    assert rows.top_tokens is not None and rows.top_tokens.tolist() == [[3, 0], [99, 0]]


@pytest.mark.parametrize("block", [5, 64, 1000])
@pytest.mark.parametrize("k", [1, 3, 40, 64])
def test_of_equal_tokens_the_lower_comes_first(block: int, k: int) -> None:
    z = torch.randint(0, 9, (33, 300), generator=torch.Generator().manual_seed(k)).float()
    rows = sweep(z, OutputSpec(top_k=k), block)
    expected = [sorted(range(300), key=lambda v: (-row[v], v))[:k] for row in z.tolist()]
    assert rows.top_tokens is not None and rows.top_tokens.tolist() == expected


def test_the_largest_of_a_block_may_be_all_of_it() -> None:
    values, columns = largest(torch.tensor([[1.0, 2.0, 1.0]]), 3)
    assert (values.tolist(), columns.tolist()) == ([[2.0, 1.0, 1.0]], [[1, 0, 2]])


# ---- bits --------------------------------------------------------------------------------------------------------

WORK = {
    "plain": (LORAS["below"], (7, 1, 22), ALL),
    "head": (LORAS["on the head"], (61, 3), ALL),
    "entropy": (LORAS["below"], (1,), OutputSpec(entropy=True)),
    "top": (LORAS["below"], (37,), OutputSpec(top_k=64, logsumexp=True)),
    "nothing": (LORAS["below"], (12,), None),
    "head nothing": (LORAS["on the head"], (5,), None),
}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def run(model: hf_model.LoadedModel, order: list[str], pack_tokens: int = 1024) -> dict[str, tuple[object, ...]]:
    bench = Bench(model, pack_tokens=pack_tokens)
    for name in order:
        bench.add(name, WORK[name][0], seed=len(name), b_scale=0.05)
    work = [(name, random_data(len(name), WORK[name][1], model.info.vocab_size), WORK[name][2]) for name in order]
    answers = forward(bench, *work)
    return {name: (a.loss, a.logprobs, a.outputs) for name, a in zip(order, answers, strict=True)}


@pytest.fixture(scope="module", params=[203, 5003])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> hf_model.LoadedModel:
    odd = {"hidden_size": 36, "intermediate_size": 51, "num_attention_heads": 2, "num_key_value_heads": 1}
    directory = write_tiny_model(tmp_path_factory.mktemp("bits"), vocab_size=request.param, **odd)
    return hf_model.load(str(directory))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("products", ["shared", "split"])
def test_bits_do_not_depend_on_company(
    model: hf_model.LoadedModel, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if products == "split":
        monkeypatch.setattr(Heights, "alike", lambda self: False)
    elif not model.runtime.heights.alike():
        pytest.skip("products over rows of several micro-batches change bits on this processor")
    names = list(WORK)
    alone = {name: run(model, [name])[name] for name in names}
    for order in (names, names[::-1], names[3:] + names[:3], ["nothing", "plain"], ["top", "entropy", "head"]):
        for pack_tokens in (1024, 60):
            together = run(model, order, pack_tokens)
            for name in order:
                assert together[name] == alone[name], f"{name} in {order}"


def test_what_else_is_asked_for_does_not_change_bits(model: hf_model.LoadedModel) -> None:
    bench = Bench(model)
    bench.add("a", LORAS["below"], 1, b_scale=0.05)
    data = random_data(3, (9, 30), model.info.vocab_size)
    whole, bare, few = forward(bench, ("a", data, ALL), ("a", data, None), ("a", data, OutputSpec(top_k=2)))
    assert whole.logprobs == bare.logprobs == few.logprobs
    assert bare.outputs is None and whole.outputs is not None and few.outputs is not None
    for mine, theirs, datum in zip(few.outputs, whole.outputs, data, strict=True):
        for name in ("top_tokens", "top_logprobs"):
            wide = array(getattr(theirs, name), "<i4").reshape(datum.num_tokens, 5)
            assert (array(getattr(mine, name), "<i4").reshape(-1, 2) == wide[:, :2]).all()
        assert mine == DatumOutputs(top_tokens=mine.top_tokens, top_logprobs=mine.top_logprobs)


def test_the_likeliest_token_as_a_target_has_the_same_logprob(model: hf_model.LoadedModel) -> None:
    bench = Bench(model)
    bench.add("a", LORAS["on the head"], 1, b_scale=0.05)
    (datum,) = random_data(3, (30,), model.info.vocab_size)
    (first,) = forward(bench, ("a", [datum], OutputSpec(top_k=1)))
    assert first.outputs is not None
    greedy = Datum(datum.tokens, first.outputs[0].top_tokens or b"", datum.loss_inputs)
    (second,) = forward(bench, ("a", [greedy], None))
    assert second.logprobs == [first.outputs[0].top_logprobs]


def test_outputs_that_are_not_finite_fail_alone(model: hf_model.LoadedModel) -> None:
    """A row of weight zero is in no loss, yet in the outputs."""
    bench = Bench(model)
    bench.add("bad", LORAS["on the head"], 1).weights.flat[::7] = float("nan")
    bench.add("good", LORAS["below"], 1, b_scale=0.05)
    data = random_data(3, (9,), model.info.vocab_size)
    (alone,) = forward(bench, ("good", data, ALL))
    units = [msgspec.structs.replace(bench.unit(n, data, backward=False), outputs=ALL) for n in ("bad", "good")]
    bad, good = bench.trainer.run(units)
    assert isinstance(bad, UnitFailed) and bad.code == "non-finite"
    assert isinstance(good, ForwardBackwardDone)
    assert (good.logprobs, good.outputs) == (alone.logprobs, alone.outputs)


def test_there_is_no_room_for_what_was_not_asked_for() -> None:
    rows = Rows(4, 9, OutputSpec(entropy=True), 100, torch.zeros(0))
    assert rows.entropy is not None and rows.entropy.shape == (5,)
    assert rows.logits is rows.top_tokens is rows.top_logprobs is rows.logsumexp is None
