"""The built-in losses: formulas by hand, gradients, and the contract's list of them."""

import math

import pytest
import torch

from tinkerbell.errors import InvalidRequest
from tinkerbell.losses import registry
from tinkerbell.types import BUILTIN_LOSSES, LossSpec

LOGPROBS = torch.tensor([-1.0, -2.0, -0.5, -3.0])
POLICY = {"logprobs": torch.tensor([-1.2, -1.5, -0.5, -3.5]), "advantages": torch.tensor([1.0, -2.0, 0.5, 3.0])}
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0])


def value(name: str, inputs: dict[str, torch.Tensor], **config: float) -> registry.LossValue:
    return registry.evaluate(registry.resolve(LossSpec(name=name, config=config)), LOGPROBS, inputs)


def test_the_contract_lists_exactly_the_losses_there_are() -> None:
    assert set(registry.functions()) == set(BUILTIN_LOSSES)


@pytest.mark.parametrize("name", BUILTIN_LOSSES)
def test_a_loss_reads_what_its_signature_says(name: str) -> None:
    """It runs with the required inputs alone, fails without any one of them, and its weights are optional."""
    signature = BUILTIN_LOSSES[name]
    inputs = {key: torch.full((4,), 0.3) for key in signature.required}
    plain = value(name, inputs)
    for key in signature.required:
        with pytest.raises(KeyError, match=key):
            value(name, {k: v for k, v in inputs.items() if k != key})
    for key in signature.optional:
        assert value(name, inputs | {key: torch.ones(4)}).loss == plain.loss
        assert value(name, inputs | {key: torch.full((4,), 2.0)}).loss == pytest.approx(2 * plain.loss)
        assert value(name, inputs | {key: torch.zeros(4)}).loss == 0
    for setting in signature.config:
        value(name, inputs, **{setting: 0.5})


@pytest.mark.parametrize("name", BUILTIN_LOSSES)
def test_micro_batches_add(name: str) -> None:
    inputs = POLICY if BUILTIN_LOSSES[name].required else {}
    loss = registry.resolve(LossSpec(name=name))
    whole = registry.evaluate(loss, LOGPROBS, inputs)
    halves = [
        registry.evaluate(loss, LOGPROBS[part], {k: v[part] for k, v in inputs.items()})
        for part in (slice(0, 2), slice(2, 4))
    ]
    assert sum(half.loss for half in halves) == pytest.approx(whole.loss, rel=1e-12)
    for metric, total in whole.metrics.items():
        assert sum(half.metrics[metric] for half in halves) == pytest.approx(total, rel=1e-12, abs=1e-12)
    assert torch.equal(torch.cat([half.gradient for half in halves]), whole.gradient)


def test_cross_entropy() -> None:
    found = value("cross_entropy", {"weights": WEIGHTS})
    assert found.loss == pytest.approx(1.0 + 1.0 + 0.0 + 6.0)
    assert found.metrics == {"num_tokens": 4.0, "weight_sum": 3.5}
    assert torch.equal(found.gradient, -WEIGHTS)


def test_importance_sampling() -> None:
    found = value("importance_sampling", POLICY | {"weights": WEIGHTS})
    ratio = [math.exp(0.2), math.exp(-0.5), 1.0, math.exp(0.5)]
    terms = [1.0 * ratio[0], 0.5 * ratio[1] * -2.0, 0.0, 2.0 * ratio[3] * 3.0]
    assert found.loss == pytest.approx(-sum(terms), rel=1e-6)
    assert found.gradient.tolist() == pytest.approx([-term for term in terms], rel=1e-6, abs=1e-12)
    assert found.metrics["ratio_sum"] == pytest.approx(ratio[0] + 0.5 * ratio[1] + 2 * ratio[3], rel=1e-6)
    assert found.metrics["kl_sum"] == pytest.approx(-0.2 + 0.5 * 0.5 + 2 * -0.5, rel=1e-6)


def test_ppo_clips_only_where_it_lowers_the_objective() -> None:
    found = value("ppo", POLICY)
    ratio = [math.exp(0.2), math.exp(-0.5), 1.0, math.exp(0.5)]
    # 1.2214 > 1.2 with A > 0: clipped. 0.6065 < 0.8 with A < 0: clipped (-1.6 < -1.213). 1.0: plain. 1.6487: clipped.
    terms = [1.2, 0.8 * -2.0, 0.5, 1.2 * 3.0]
    assert ratio[0] > 1.2
    assert found.loss == pytest.approx(-sum(terms), rel=1e-6)
    assert found.gradient.tolist() == pytest.approx([0.0, 0.0, -0.5, 0.0], rel=1e-6)
    assert found.metrics["clipped_sum"] == 3.0
    assert found.metrics["num_tokens"] == 4.0


def test_ppo_settings_are_bounds_of_the_ratio() -> None:
    found = value("ppo", POLICY, clip_low_threshold=0.1, clip_high_threshold=10.0)
    assert found.metrics["clipped_sum"] == 0.0
    assert found.loss == pytest.approx(value("importance_sampling", POLICY).loss)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="`focal` is not one of cross_entropy"):
        registry.resolve(LossSpec(name="focal"))
    with pytest.raises(InvalidRequest, match="no setting `epsilon`"):
        registry.resolve(LossSpec(name="ppo", config={"epsilon": 0.2}))
    with pytest.raises(InvalidRequest, match="`clip_high_threshold` is not a finite number"):
        registry.resolve(LossSpec(name="ppo", config={"clip_high_threshold": math.inf}))
