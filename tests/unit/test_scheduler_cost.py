"""Cost estimates, their calibration, and the division of measured time."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinkerbell.events import kinds
from tinkerbell.executors.port import SampleDone
from tinkerbell.scheduler.cost import PRIOR_US, CostModel, divide_us, features, learn, own, shared, split_us
from tinkerbell.scheduler.pending import LANES, PendingRequest
from tinkerbell.types import AdamParams, LossSpec, OutputSpec, SampledSequence, SamplingParams


def request(kind: str, event: kinds.Request, lengths: tuple[int, ...] | None = None) -> PendingRequest:
    num_samples = event.params.num_samples if isinstance(event, kinds.SampleRequested) else 0
    chunks = [(0, 2), (2, 3)] if lengths else [(0, num_samples)]
    return PendingRequest(1, "t", "a", 0, event, kind, LANES[kind], lengths, chunks)  # type: ignore[arg-type]


@given(busy_us=st.integers(0, 10**12), weights=st.lists(st.integers(1, 10**12), min_size=1, max_size=50))
def test_parts_sum_to_the_whole(busy_us, weights):
    parts = split_us(busy_us, weights)
    assert sum(parts) == busy_us
    assert len(parts) == len(weights)
    assert min(parts) >= 0


def test_parts_are_proportional():
    assert split_us(100, [1, 3]) == [25, 75]
    assert split_us(10, [1, 1, 1]) == [3, 3, 4]


def test_what_a_unit_needs():
    data = request(
        "forward_backward",
        kinds.ForwardBackwardRequested(loss=LossSpec(), num_datums=3, num_tokens=9),
        (2, 3, 4),
    )
    first = {"unit": 1.0, "backward_token": 5.0, "attention": 13.0, "lora": 1500.0}
    assert shared(features(data, 0, 100)) == first
    assert shared(features(data, 1, 100)) == {**first, "backward_token": 4.0, "attention": 16.0, "lora": 1200.0}
    assert own(features(data, 1, 100)) == {"loss": 4.0, "gradient": 100.0}
    forward = request("forward", kinds.ForwardRequested(loss=LossSpec(), num_datums=3, num_tokens=9), (2, 3, 4))
    assert features(forward, 1, 100) == {
        "unit": 1.0, "forward_token": 4.0, "attention": 16.0, "lora": 400.0, "loss": 4.0,
    }  # fmt: skip
    step = request("optim_step", kinds.OptimStepRequested(adam=AdamParams()))
    assert features(step, 0, 100) == {"unit": 1.0, "parameter": 100.0}
    assert features(request("save", kinds.SaveRequested(checkpoint="ck")), 0, 0) == {"save": 1.0}


def test_a_sample_costs_what_it_may_become_until_it_is_known():
    params = SamplingParams(max_tokens=10, num_samples=2)
    sample = request("sample", kinds.SampleRequested(params=params, num_tokens=7))
    assert features(sample, 0, 0)["sampled_token"] == 20
    short = SampledSequence(b"\0" * 12, b"\0" * 12, "stop")
    done = SampleDone(request=1, sequences=[short, short], prompt_logprobs=None)
    assert features(sample, 0, 0, done)["sampled_token"] == 6


@pytest.mark.parametrize("kind", [kind for kind, lane in LANES.items() if lane == "control"])
def test_every_control_kind_has_a_price(kind):
    assert CostModel().estimate_us({kind: 1.0}) >= 1


def test_calibration_finds_the_coefficients_of_a_machine():
    truth = {**PRIOR_US, "unit": 1000.0, "backward_token": 20.0, "parameter": 0.01}
    generator = random.Random(0)
    model = CostModel()

    def batch() -> list[dict[str, float]]:
        units: list[dict[str, float]] = []
        for _ in range(generator.randint(1, 8)):
            if generator.random() < 0.5:
                units.append({"unit": 1.0, "backward_token": float(generator.randint(1, 1024))})
            else:
                units.append({"unit": 1.0, "parameter": float(generator.randint(10_000, 1_000_000))})
        return units

    def measured(units: list[dict[str, float]]) -> int:
        return round(sum(truth[name] * amount for unit in units for name, amount in unit.items()))

    for _ in range(2000):
        units = batch()
        model.observe(units, measured(units))
    for units in (batch() for _ in range(50)):
        estimate = sum(model.estimate_us(unit) for unit in units)
        assert abs(estimate / measured(units) - 1) < 0.15
    assert model.coefficients_us["sampled_token"] == PRIOR_US["sampled_token"]


def test_one_absurd_measurement_does_not_wreck_the_model():
    model = CostModel()
    before = model.estimate_us({"save": 1.0})
    model.observe([{"save": 1.0}], 10**12)
    assert before < model.estimate_us({"save": 1.0}) < 2 * before
    model.observe([{"save": 1.0}], 0)
    assert model.estimate_us({"save": 1.0}) >= 1


FREE_OF_SAMPLES = {
    "temperature": "scales numbers that are there",
    "top_k": "cuts what is sorted in any case",
    "top_p": "cuts what is sorted in any case",
    "seed": "a number",
    "stop": "texts are looked for in what is sampled; measured with it",
    "stop_tokens": "looked up",
    "prompt_logprobs": "a flag",
}
FREE_OF_OUTPUTS = {"logsumexp": "known where logprobs are"}


def _price(event: kinds.Request, kind: str) -> int:
    lengths = (2, 3, 4) if kind != "sample" else None
    return CostModel().estimate_us(features(request(kind, event, lengths), 0, 100))


def test_whatever_a_sample_can_ask_for_has_a_price():
    """A new setting has one, too, or says here why not."""
    plain = kinds.SampleRequested(params=SamplingParams(max_tokens=4), num_tokens=7)
    for field in msgspec.structs.fields(SamplingParams):
        if field.name in FREE_OF_SAMPLES:
            continue
        more = 2 * getattr(plain.params, field.name) or 8
        params = msgspec.structs.replace(plain.params, **{field.name: more})
        # What is asked of each sampled token.
        assert _price(msgspec.structs.replace(plain, params=params), "sample") > _price(plain, "sample"), field.name
    scored = msgspec.structs.replace(plain, params=SamplingParams(max_tokens=4, prompt_logprobs=True))
    assert _price(scored, "sample") > _price(plain, "sample")
    assert _price(msgspec.structs.replace(plain, num_tokens=70), "sample") > _price(plain, "sample")
    asked = request("sample", plain)
    before = features(asked, 0, 0)
    asked.num_prompt_targets = 20
    assert CostModel().estimate_us(features(asked, 0, 0)) > CostModel().estimate_us(before)


def test_whatever_a_forward_can_ask_for_has_a_price():
    plain = kinds.ForwardRequested(loss=LossSpec(), num_datums=3, num_tokens=9)
    for field in msgspec.structs.fields(OutputSpec):
        if field.name not in FREE_OF_OUTPUTS:
            value = True if field.type is bool else 8
            outputs = msgspec.structs.replace(plain, outputs=OutputSpec(**{field.name: value}))
            assert _price(outputs, "forward") > _price(plain, "forward"), field.name
    assert _price(msgspec.structs.replace(plain, num_targets=100), "forward") > _price(plain, "forward")
    data = request(
        "forward_backward", kinds.ForwardBackwardRequested(loss=LossSpec(), num_datums=3, num_tokens=9), (9,)
    )
    data.chunks = [(0, 1)]
    large, small = (CostModel().estimate_us(features(data, 0, size)) for size in (80_000_000, 1_000_000))
    assert large > 2 * small, "of rank 1024 beside rank 16"


UNITS = st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 1000), st.integers(0, 10**5)), min_size=1, max_size=16)


@given(units=UNITS, rest_us=st.integers(0, 10**7))
def test_what_a_unit_had_to_itself_is_nobody_elses(units, rest_us):
    needed = [{"unit": 1.0, "forward_token": float(tokens), "draw": float(draws)} for _, tokens, draws in units]
    own_us = [mine for mine, _, _ in units]
    busy_us = sum(own_us) + rest_us
    parts = divide_us(busy_us, needed, own_us, CostModel())
    assert sum(parts) == busy_us
    for part, mine in zip(parts, own_us, strict=True):
        assert mine <= part <= mine + rest_us
    # An executor that claims more than there was is not believed.
    assert sum(divide_us(rest_us, needed, [mine + rest_us for mine in own_us], CostModel())) == rest_us


def test_what_is_told_apart_is_learnt_apart():
    model = CostModel()
    needed = [{"unit": 1.0, "forward_token": 100.0, "logits": 100.0}, {"unit": 1.0, "forward_token": 100.0}]
    for _ in range(200):
        learn(model, 2_000_000 + 4000, needed, [2_000_000, 0])
    assert abs(model.estimate_us(own(needed[0])) / 2_000_000 - 1) < 0.05
    assert abs(model.estimate_us(needed[1]) / 2000 - 1) < 0.05
