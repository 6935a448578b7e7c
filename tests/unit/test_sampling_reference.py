"""Sampling on a tiny random model in fp64 against Hugging Face and PEFT, where only a wrong formula can differ."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tests.support.executor_driver import Driver, ints, nameless, random_data, read_floats, read_ints
from tests.support.peft_reference import Reference
from tests.support.rounding import ALGEBRA, EPS
from tests.support.tiny_model import write_tiny_model
from tinkerbell.executors.hf.executor import HFExecutor
from tinkerbell.executors.hf.sampler import Sampler
from tinkerbell.executors.port import SampleDone, UnitFailed
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.types import AdamParams, LoraConfig

ADAPTERS = {
    "qv": LoraConfig(rank=8, alpha=16, targets=("q_proj", "v_proj")),
    "all": LoraConfig(rank=16, alpha=32, targets=("all-linear",)),
    "head": LoraConfig(rank=3, alpha=5, targets=("unembed", "o_proj")),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), attention_bias=True)


@pytest.fixture(scope="module")
def executor(directory: Path) -> HFExecutor:
    executor = HFExecutor(ExecutorOptions(model=str(directory), threads=1, extra={"dtype": "float64"}))
    driver = Driver(executor)
    for seed, (name, lora) in enumerate(ADAPTERS.items()):
        executor.create(name, lora, seed)
        for step in range(2):
            data = random_data(seed + 10 * step, (12,))
            adam = AdamParams(learning_rate=0.05)
            driver.done(driver.forward_backward(name, data), driver.optim_step(name, adam))
    return executor


@pytest.fixture
def driver(executor: HFExecutor) -> Driver:
    return Driver(executor)


def sampler(executor: HFExecutor, **limits: int) -> Sampler:
    return Sampler(executor._runtime, executor._info, executor._adapters, **limits)


@torch.no_grad()
def logits_after(reference: Any, tokens: list[int]) -> torch.Tensor:
    """[N, V] by a full forward pass without a cache."""
    logits: torch.Tensor = reference.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_and_logprobs_are_those_of_full_forwards(
    directory: Path, executor: HFExecutor, driver: Driver, temperature: float
) -> None:
    """Three adapters in one batch, prompts of unequal length, several samples: every step recomputed from nothing."""
    prompts = {"qv": [5], "all": [7, 8, 9, 10, 11, 12, 13], "head": [3, 1, 4]}
    units = [
        driver.sample(name, prompt, temperature=temperature, max_tokens=9, num_samples=2, prompt_logprobs=True)
        for name, prompt in prompts.items()
    ]
    answers = driver.done(*units)
    for (name, prompt), answer in zip(prompts.items(), answers, strict=True):
        assert isinstance(answer, SampleDone)
        reference = Reference(directory, executor._adapters[name], torch.float64)
        for sequence in answer.sequences:
            tokens = prompt + read_ints(sequence.tokens)
            logits = logits_after(reference, tokens)
            logprobs = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
            assert answer.prompt_logprobs is not None
            found = read_floats(answer.prompt_logprobs) + read_floats(sequence.logprobs)
            np.testing.assert_allclose(found, logprobs.numpy(), rtol=EPS, atol=ALGEBRA)
            if temperature == 0:
                assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == read_ints(sequence.tokens)


def test_distributions_are_those_of_full_forwards(
    directory: Path, executor: HFExecutor, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likeliest tokens of samples and prompts, and targets, with and without a LoRA on the head, of prompts of several
    chunks and of one token."""
    monkeypatch.setattr("tinkerbell.executors.hf.head.CHUNK_ROWS", 16)
    draw = np.random.default_rng(1)
    prompts = {"qv": [5], "all": draw.integers(1, 250, 300).tolist(), "head": draw.integers(1, 250, 70).tolist()}
    targets = {name: draw.integers(-1, 256, (len(prompt), 3)).tolist() for name, prompt in prompts.items()}
    units = [
        driver.sample(name, prompt, 3, targets[name], max_tokens=6, top_logprobs=5, prompt_top_logprobs=4)
        for name, prompt in prompts.items()
    ]
    for (name, prompt), answer in zip(prompts.items(), driver.done(*units), strict=True):
        assert isinstance(answer, SampleDone) and answer.prompt_scores is not None
        reference = Reference(directory, executor._adapters[name], torch.float64)
        (sequence,), scores = answer.sequences, answer.prompt_scores
        rows = torch.log_softmax(logits_after(reference, prompt + read_ints(sequence.tokens)), -1)[:-1]
        before, sampled = rows[: len(prompt) - 1], rows[len(prompt) - 1 :]
        for part, k, tokens, logprobs in (
            (before, 4, scores.top_tokens, scores.top_logprobs),
            (sampled, 5, sequence.top_tokens, sequence.top_logprobs),
        ):
            top = part.topk(k)
            assert tokens is not None and logprobs is not None
            assert read_ints(tokens) == top.indices.flatten().tolist()
            np.testing.assert_allclose(read_floats(logprobs), top.values.flatten().numpy(), rtol=EPS, atol=ALGEBRA)
        asked = torch.tensor(targets[name])
        expected = torch.full(asked.shape, torch.nan, dtype=torch.float64)
        expected[1:] = torch.where(asked[1:] < 0, torch.nan, before.gather(1, asked[1:].clamp(0)))
        assert scores.target_logprobs is not None
        found = np.array(read_floats(scores.target_logprobs)).reshape(expected.shape)
        np.testing.assert_allclose(found, expected.numpy(), rtol=EPS, atol=ALGEBRA)


@pytest.mark.parametrize("name", ["top_logprobs", "prompt_top_logprobs"])
def test_no_more_likeliest_tokens_than_there_are(driver: Driver, name: str) -> None:
    size = driver.info.vocab_size
    assert f"than the {size} tokens" in driver.refused(driver.sample(None, [1, 2], **{name: size + 1})).message


def test_few_rows_and_little_memory_change_nothing(executor: HFExecutor, driver: Driver) -> None:
    """Samples that have to wait for room, one at a time in the extreme, are the same samples."""
    units = [
        driver.sample(name, list(range(3, 6 + n)), seed=n, max_tokens=4 + 2 * n, num_samples=1 + n % 3)
        for n, name in enumerate([*ADAPTERS, None, *ADAPTERS])
    ]
    plenty = [nameless(answer) for answer in sampler(executor).sample(units)]
    assert not any(isinstance(answer, UnitFailed) for answer in plenty)
    for limits in ({"max_rows": 1}, {"max_rows": 5}, {"cache_bytes": 1}, {"cache_bytes": 40_000}):
        assert [nameless(answer) for answer in sampler(executor, **limits).sample(units)] == plenty


def test_more_rows_than_one_pass_holds(executor: HFExecutor, driver: Driver) -> None:
    many = driver.sample("all", [3, 4, 5], seed=1, max_tokens=3, num_samples=70)
    units = [driver.sample("qv", [9, 9], seed=2, max_tokens=3, num_samples=3), many]
    (_, together) = sampler(executor, max_rows=100).sample(units)
    (alone,) = sampler(executor, max_rows=7).sample([many])
    assert isinstance(together, SampleDone)
    assert together == alone
    assert len({sequence.tokens for sequence in together.sequences}) > 50


def test_a_cache_grows_beyond_its_first_block(directory: Path, executor: HFExecutor, driver: Driver) -> None:
    (answer,) = driver.done(driver.sample("all", [3, 4, 5], temperature=0.0, max_tokens=200))
    assert isinstance(answer, SampleDone)
    tokens = [3, 4, 5, *read_ints(answer.sequences[0].tokens)]
    reference = Reference(directory, executor._adapters["all"], torch.float64)
    assert logits_after(reference, tokens)[2:-1].argmax(-1).tolist() == tokens[3:]


def test_weights_that_overflow_fail_their_requests_only(executor: HFExecutor, driver: Driver) -> None:
    good = driver.sample("qv", [1, 2, 3], seed=4, max_tokens=5, prompt_logprobs=True)
    (alone,) = driver.done(good)
    executor.create("broken", LoraConfig(rank=2, targets=("q_proj", "unembed")), 1)
    executor._adapters["broken"].weights.flat.fill_(float("nan"))
    for prompt_logprobs in (True, False):
        bad = driver.sample("broken", [1, 2, 3], max_tokens=5, prompt_logprobs=prompt_logprobs, num_samples=3)
        for order in ((bad, good), (good, bad)):
            answers = dict(zip((unit.request for unit in order), driver.run(*order), strict=True))
            failed = answers[bad.request]
            assert isinstance(failed, UnitFailed)
            assert (failed.category, failed.code) == ("user", "non-finite")
            assert nameless(answers[good.request]) == nameless(alone)
    executor.remove("broken")


def test_a_request_that_breaks_the_pass_is_the_only_one_to_fail(
    executor: HFExecutor, driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception in the middle (out of memory, say): the others are answered as if nothing had been."""
    units = [driver.sample("qv", [1, 2, 3], seed=n, max_tokens=4) for n in range(3)]
    bad = driver.sample("all", [99, 98], seed=1, max_tokens=4)
    whole = sampler(executor)
    expected = whole.sample(units)
    prefill = whole._prefill

    def breaking(jobs: Any) -> None:
        if any(job.prompt == [99, 98] for job in jobs):
            raise RuntimeError("not enough memory")
        prefill(jobs)

    monkeypatch.setattr(whole, "_prefill", breaking)
    answers = whole.sample([units[0], bad, *units[1:]])
    failed = answers.pop(1)
    assert isinstance(failed, UnitFailed)
    assert (failed.category, failed.code) == ("server", "out-of-memory")
    assert answers == expected
    assert "not enough memory" in caplog.text


def test_stop_texts_need_a_tokenizer(driver: Driver) -> None:
    assert "tokenizer" in driver.refused(driver.sample("qv", [1, 2], stop=("a",))).message


def test_tiles_share_gemms_on_this_machine_or_do_without(
    executor: HFExecutor, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one GEMM over all tiles would change bits, tiles run one by one: the same tokens."""
    units = [
        driver.sample(name, [4, 5, 6, 7], seed=n, max_tokens=6) for n, name in enumerate([*ADAPTERS, None, *ADAPTERS])
    ]
    usual = sampler(executor)
    expected = usual.sample(units)
    split = sampler(executor)
    monkeypatch.setattr(split._decoder, "fused", False)
    if usual._decoder.fused:
        assert split.sample(units) == expected
    else:
        assert all(isinstance(answer, SampleDone) for answer in split.sample(units))


def test_half_a_token_is_refused(driver: Driver) -> None:
    unit = driver.sample("qv", [1])
    driver.refused(msgspec.structs.replace(unit, prompt=ints([1, 2])[:-1]))
