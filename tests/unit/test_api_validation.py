"""What a request may hold, decided without a server."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.api_driver import MODEL
from tinkerbell import wire
from tinkerbell.api import validation
from tinkerbell.config import Limits
from tinkerbell.errors import InvalidRequest, NotFound, TooLarge
from tinkerbell.types import BUILTIN_LOSSES, Datum, LoraConfig, LossSpec, SamplingParams

LIMITS = Limits(max_request_tokens=1000, max_output_bytes=64)


def body(tokens: list[int], targets: list[int] | None = None, **loss_inputs: list[float]) -> wire.DatumBody:
    return wire.DatumBody(tokens=tokens, targets=targets or tokens, loss_inputs=loss_inputs)


def data(
    bodies: list[wire.DatumBody], loss: LossSpec | None = None, limits: Limits = LIMITS, num_targets: int = 1
) -> list[Datum]:
    asked = wire.ForwardBackward(data=bodies, loss=loss or LossSpec(), num_targets=num_targets)
    return validation.data(asked, MODEL, limits)


def test_lists_become_little_endian_bytes_in_their_order() -> None:
    (datum,) = data([body([1, 2, 3], [2, 3, 4], weights=[0.5, 0.0, -2.0])])
    assert np.frombuffer(datum.tokens, "<i4").tolist() == [1, 2, 3]
    assert np.frombuffer(datum.targets, "<i4").tolist() == [2, 3, 4]
    assert np.frombuffer(datum.loss_inputs["weights"], "<f4").tolist() == [0.5, 0.0, -2.0]
    assert datum.num_tokens == 3


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=MODEL.max_length))
def test_every_float32_survives(weights: list[float]) -> None:
    (datum,) = data([body([1] * len(weights), weights=weights)])
    assert np.frombuffer(datum.loss_inputs["weights"], "<f4").tolist() == weights


@pytest.mark.parametrize(
    ("bodies", "loss", "message"),
    [
        ([body([1, 100])], LossSpec(), r"data\[0\]\.tokens\[1\] is 100; the vocabulary of tiny has 100"),
        ([body([1]), body([1, 2], [1, 100])], LossSpec(), r"data\[1\]\.targets\[1\] is 100"),
        ([body([1, 2], [1])], LossSpec(), r"data\[0\] has 2 tokens and 1 targets"),
        ([body([1] * 33)], LossSpec(), r"data\[0\] has 33 tokens; tiny takes at most 32"),
        (
            [body([1, 2], weights=[1.0])],
            LossSpec(),
            r"data\[0\]\.loss_inputs\.weights has 1 numbers for 2 tokens",
        ),
        ([body([1], weights=[1e39])], LossSpec(), r"weights\[0\] is 1e\+39; it must be a finite float32"),
        ([body([1], weights=[float("nan")])], LossSpec(), r"weights\[0\] is nan"),
        ([body([1], advantages=[1.0])], LossSpec(), r"cross_entropy reads no 'advantages'; it reads weights"),
        ([body([1], logprobs=[1.0])], LossSpec(name="ppo"), r"ppo needs 'advantages'"),
        ([body([1])], LossSpec(name="mse"), r"loss\.name: 'mse' is none of cross_entropy"),
        ([body([1])], LossSpec(config={"clip": 1.0}), r"cross_entropy has no setting 'clip'; it has none"),
        (
            [body([1], logprobs=[0.0], advantages=[0.0])],
            LossSpec(name="ppo", config={"clip": 1.0}),
            r"ppo has no setting 'clip'; it has clip_low_threshold, clip_high_threshold",
        ),
    ],
)
def test_what_is_wrong_is_named(bodies: list[wire.DatumBody], loss: LossSpec, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        data(bodies, loss)


@pytest.mark.parametrize("name", BUILTIN_LOSSES)
def test_every_built_in_loss_takes_what_its_signature_says(name: str) -> None:
    signature = BUILTIN_LOSSES[name]
    inputs = {key: [0.5] for key in (*signature.required, *signature.optional)}
    (datum,) = data([body([1], **inputs)], LossSpec(name=name, config=signature.config))
    assert set(datum.loss_inputs) == set(inputs)


def test_a_request_may_have_so_many_tokens() -> None:
    bodies = [body([1] * 10)] * 2
    assert len(data(bodies, limits=Limits(max_request_tokens=20))) == 2
    with pytest.raises(TooLarge, match="20 tokens; a request may have 19"):
        data(bodies, limits=Limits(max_request_tokens=19))


def test_several_targets_of_a_token_are_rows() -> None:
    (datum,) = data([body([1, 2], [2, 3, 3, 4], weights=[0.5, 0.0, 1.0, -2.0])], num_targets=2)
    assert np.frombuffer(datum.targets, "<i4").tolist() == [2, 3, 3, 4]
    assert np.frombuffer(datum.loss_inputs["weights"], "<f4").tolist() == [0.5, 0.0, 1.0, -2.0]
    with pytest.raises(InvalidRequest, match=r"2 tokens and 3 targets; it must have as many times 2"):
        data([body([1, 2], [2, 3, 3])], num_targets=2)
    with pytest.raises(InvalidRequest, match=r"weights has 2 numbers for 2 tokens times 2"):
        data([body([1, 2], [2, 3, 3, 4], weights=[1.0, 1.0])], num_targets=2)
    with pytest.raises(InvalidRequest, match="ppo takes one target for each token, not 2; cross_entropy takes more"):
        data([body([1], [2, 3], logprobs=[0.0] * 2, advantages=[0.0] * 2)], LossSpec(name="ppo"), num_targets=2)
    with pytest.raises(TooLarge, match="2 targets of 9 tokens have 72 bytes; those of a request may have 64"):
        data([body([1] * 9, [1] * 18)], num_targets=2)


@pytest.mark.parametrize("targets", [("attention",), ("mlp", "q_proj"), ("all-linear",), ("gate_proj",)])
def test_lora_targets_are_presets_or_modules(targets: tuple[str, ...]) -> None:
    validation.lora(LoraConfig(targets=targets), MODEL)


@pytest.mark.parametrize("targets", [("lm_head",), ("unembed",), ("q_proj", "qproj")])
def test_lora_targets_the_model_lacks(targets: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match=f"tiny has no '{targets[-1]}'; it has q_proj"):
        validation.lora(LoraConfig(targets=targets), MODEL)


def sample(prompt: list[int], **params: object) -> wire.Sample:
    return wire.Sample(prompt=prompt, params=SamplingParams(**params))  # type: ignore[arg-type]


def test_a_prompt_must_leave_room_for_its_continuation() -> None:
    assert (
        validation.prompt(sample([1, 2], max_tokens=30), MODEL, LIMITS.max_request_tokens)
        == np.array([1, 2], "<i4").tobytes()
    )
    with pytest.raises(InvalidRequest, match=r"2 tokens and params\.max_tokens is 31: 33 together; tiny takes"):
        validation.prompt(sample([1, 2], max_tokens=31), MODEL, LIMITS.max_request_tokens)


@pytest.mark.parametrize(
    ("request_body", "error", "message"),
    [
        (sample([100], max_tokens=1), InvalidRequest, r"prompt\[0\] is 100"),
        (sample([1], max_tokens=1, stop=("a\0",)), InvalidRequest, r"stop\[0\] has a NUL"),
        (sample([1], max_tokens=1, stop_tokens=(5, 100)), InvalidRequest, r"stop_tokens\[1\] is 100"),
        (sample([1], max_tokens=1, temperature=1e-9), InvalidRequest, "temperature is 1e-09"),
        (sample([1], max_tokens=10, num_samples=100), TooLarge, "100 samples of 10 tokens are 1001 tokens"),
    ],
)
def test_sampling_settings(request_body: wire.Sample, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        validation.prompt(request_body, MODEL, LIMITS.max_request_tokens)


@pytest.mark.parametrize(
    "text",
    ["", "ad_", "ad_" + "a" * 19, "ad_" + "A" * 20, "ad_" + "a" * 20 + "\n", "ad_\0", "ck_" + "a" * 20],
)
def test_what_cannot_be_an_adapter_is_not_found(text: str) -> None:
    with pytest.raises(NotFound, match="There is no adapter"):
        validation.adapter_id(text)
