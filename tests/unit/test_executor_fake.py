"""The fake executor's arithmetic: its gradient, its AdamW, and the time it pretends to need."""

import math
import time

import msgspec
import pytest
import torch

from tests.support.executor_driver import Driver, datum, random_data, read_ints
from tests.support.rounding import ALGEBRA
from tinkerbell.errors import Corrupt, InvalidRequest
from tinkerbell.executors.fake import FakeExecutor
from tinkerbell.executors.port import Batch, ForwardBackwardDone, OptimStepDone, SampleDone
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.types import AdamParams, LoraConfig, LossSpec

LORA = LoraConfig(rank=1, alpha=2.0)


def fake(**extra: str) -> FakeExecutor:
    return FakeExecutor(ExecutorOptions(extra=extra))


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo", "dro", "gspo"])
def test_the_gradient_is_the_slope_of_the_loss(loss: str) -> None:
    executor = fake(vocab_size="16")
    driver = Driver(executor)
    name = driver.adapter(lora=LORA)
    adapter = executor._adapters[name]
    for k in range(len(adapter.weights)):
        adapter.weights[k] = math.sin(k + 1)
    extra = {"weights": [1.0, 0.5, 2.0, 0.0, 1.5]}
    if loss != "cross_entropy":
        extra |= {"logprobs": [-1.0, -3.0, -2.5, -2.0, -3.5], "advantages": [1.0, -1.0, 2.0, 1.0, 0.5]}
    if loss == "gspo":
        extra["sequence_ratio_mask"] = [1.0, 1.0, 0.0, 1.0, 1.0]
    data = [datum([1, 2, 3, 1, 2, 15], **extra)]

    def value() -> float:
        executor._distributions.clear()
        (done,) = driver.done(driver.forward_backward(name, data, LossSpec(name=loss), backward=False))
        assert isinstance(done, ForwardBackwardDone)
        return done.loss

    driver.done(driver.forward_backward(name, data, LossSpec(name=loss)))
    assert adapter.gradient is not None
    step = 1e-6
    for k in range(len(adapter.weights)):
        before = adapter.weights[k]
        adapter.weights[k] = before + step
        above = value()
        adapter.weights[k] = before - step
        below = value()
        adapter.weights[k] = before
        assert adapter.gradient[k] == pytest.approx((above - below) / (2 * step), abs=step)


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_the_step_is_torchs_adamw(clip: float) -> None:
    executor = fake()
    driver = Driver(executor)
    name = driver.adapter(lora=LORA)
    adapter = executor._adapters[name]
    adam = AdamParams(learning_rate=0.03, beta1=0.8, beta2=0.97, eps=1e-6, weight_decay=0.1, grad_clip_norm=clip)
    parameter = torch.tensor(adapter.weights, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=0.03, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.1)
    for step in range(4):
        driver.done(driver.forward_backward(name, random_data(step, (9, 5))))
        parameter.grad = torch.tensor(adapter.gradient, dtype=torch.float64)
        norm = float(parameter.grad.norm())
        if clip:
            torch.nn.utils.clip_grad_norm_([parameter], clip)
        optimizer.step()
        (done,) = driver.done(driver.optim_step(name, adam))
        assert isinstance(done, OptimStepDone)
        assert done.grad_norm == pytest.approx(norm, rel=ALGEBRA)
        assert list(adapter.weights) == pytest.approx(parameter.tolist(), rel=ALGEBRA, abs=ALGEBRA)


def test_pretended_time_is_taken_and_reported() -> None:
    executor = fake(latency_us="20000", us_per_token="1000")
    driver = Driver(executor)
    name = driver.adapter()
    for unit, num_tokens in (
        (driver.forward_backward(name, random_data(1, (10, 5))), 15),
        (driver.sample(name, [1, 2, 3], max_tokens=4, num_samples=2), 11),
    ):
        started = time.perf_counter()
        result = executor.run(Batch(id="1.1", units=[unit]))
        elapsed_us = 1e6 * (time.perf_counter() - started)
        assert 20_000 + 1000 * num_tokens <= result.busy_us <= elapsed_us


def test_unknown_options_are_refused() -> None:
    for extra in ({"vocab": "5"}, {"latency_us": "-1"}, {"latency_us": "soon"}):
        with pytest.raises(InvalidRequest):
            fake(**extra)


def test_a_state_that_was_changed_is_corrupt() -> None:
    driver = Driver(fake())
    name = driver.trained()
    state = driver.executor.snapshot(name)
    weights = bytearray(state.weights)
    weights[-3] ^= 1
    with pytest.raises(Corrupt):
        driver.executor.load(name, msgspec.structs.replace(state, weights=bytes(weights)), True)


def test_stop_texts_are_bytes() -> None:
    driver = Driver(fake())
    (free,) = driver.done(driver.sample(None, [1], seed=3, max_tokens=40))
    assert isinstance(free, SampleDone)
    tokens = read_ints(free.sequences[0].tokens)
    ascii_at = next(i for i in range(5, 40) if tokens[i] < 128 and chr(tokens[i]).isprintable())
    stop = chr(tokens[ascii_at])
    first = tokens.index(ord(stop))
    (stopped,) = driver.done(driver.sample(None, [1], seed=3, max_tokens=40, stop=(stop,)))
    assert isinstance(stopped, SampleDone)
    assert read_ints(stopped.sequences[0].tokens) == tokens[: first + 1]
    assert stopped.sequences[0].stop_reason == "stop"


@pytest.mark.parametrize("name", ["top_logprobs", "prompt_top_logprobs"])
def test_no_more_likeliest_tokens_than_there_are(name: str) -> None:
    driver = Driver(fake())
    size = driver.info.vocab_size
    assert f"than the {size} tokens" in driver.refused(driver.sample(None, [1, 2], **{name: size + 1})).message
