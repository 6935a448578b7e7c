"""Cost estimates, their calibration, and the division of measured time."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinkerbell.events import kinds
from tinkerbell.executors.port import SampleDone
from tinkerbell.scheduler.cost import PRIOR_US, CostModel, features, split_us
from tinkerbell.scheduler.pending import LANES, PendingRequest
from tinkerbell.types import AdamParams, LossSpec, SampledSequence, SamplingParams


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
    assert features(data, 0, 100) == {"unit": 1.0, "backward_token": 5.0, "attention": 13.0}
    assert features(data, 1, 100) == {"unit": 1.0, "backward_token": 4.0, "attention": 16.0}
    forward = request("forward", kinds.ForwardRequested(loss=LossSpec(), num_datums=3, num_tokens=9), (2, 3, 4))
    assert features(forward, 1, 100) == {"unit": 1.0, "forward_token": 4.0, "attention": 16.0}
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
