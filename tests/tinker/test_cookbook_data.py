"""Recipes of tinker-cookbook that ask a hub for their model and their data, unmodified, with small data instead."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.real_model import real_model_directory
from tests.support.rounding import NATS
from tests.tinker import hub
from tests.tinker.conftest import Sdk, audited
from tests.tinker.recipes import arguments, metric
from tinkerbell.cli.process import ServerProcess

pytestmark = [pytest.mark.tinker, pytest.mark.timeout(900)]
RENDERER = "qwen3_instruct"
MODEL = "Qwen/Qwen3-4B-Instruct-2507"
"""By which the served model goes here: the recipes choose a renderer by name, and this one's is RENDERER."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    hub.cache_model(root, MODEL, real_model_directory())
    hub.write_data_sets(root)
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[ServerProcess]:
    environment = hub.hub_environment(root)
    with audited(ServerProcess(root / "data", ["--model", MODEL], environment=environment, ready_s=120)) as running:
        yield running


@pytest.fixture(scope="module")
def recipes(sdk: Sdk, root: Path) -> Sdk:
    return replace(sdk, hub=root)


@pytest.fixture(scope="module")
def taught(recipes: Sdk, server: ServerProcess, root: Path) -> Path:
    """Log of the supervised loop, after which the model answers in the right form."""
    log = root / "sl_loop"
    settings: dict[str, Any] = {
        "batch_size": 8, "lora_rank": 16, "learning_rate": 1e-3, "max_steps": 8, "save_every": 0
    }  # fmt: skip
    recipes.run(arguments("sl_loop", model_name=MODEL, log_path=log, **settings), server.url)
    return log


def test_supervised_loop(taught: Path) -> None:
    """What is left is the choice among four numbers, one of the six or so tokens of an answer."""
    losses = metric(taught, "train_mean_nll")
    assert len(losses) == 8 and losses[0] > 1 and losses[-1] < 0.3, losses


def test_reinforcement_loop(recipes: Sdk, server: ServerProcess, taught: Path, tmp_path: Path) -> None:
    """It goes on from the supervised loop's last checkpoint, and finds out which of the four numbers is right."""
    shutil.copy(taught / "checkpoints.jsonl", tmp_path)
    recipes.run(
        arguments(
            "rl_loop", model_name=MODEL, log_path=tmp_path,
            batch_size=2, group_size=8, learning_rate=4e-4, max_tokens=8, max_steps=13, save_every=0,
            loss_fn="importance_sampling",
        ),
        server.url,
    )  # fmt: skip
    assert metric(tmp_path, "progress/batch") == [8, 9, 10, 11, 12]
    rewards = metric(tmp_path, "reward/total")
    assert sum(rewards[-2:]) / 2 > 0.9, rewards


def test_distillation_on_policy(recipes: Sdk, server: ServerProcess, taught: Path, tmp_path: Path) -> None:
    """The student goes on from the taught state: no divergence from the sampler's copy of it, much from the base."""
    (checkpoint,) = (json.loads(line) for line in (taught / "checkpoints.jsonl").read_text().splitlines())

    def divergence(log: Path, **teacher: object) -> float:
        recipes.run(
            arguments(
                "distillation.on_policy_distillation", model_name=MODEL, renderer_name=RENDERER, log_path=log,
                load_checkpoint_path=checkpoint["state_path"], teacher_model=MODEL, **teacher,
                groups_per_batch=2, group_size=4, lora_rank=16, max_tokens=12, max_steps=1, save_every=0, eval_every=0,
            ),
            server.url,
        )  # fmt: skip
        assert max(abs(each) for each in metric(log, "optim/kl_sample_train_v1")) < NATS
        (step,) = metric(log, "teacher_kl")
        return step

    assert abs(divergence(tmp_path / "itself", teacher_checkpoint=checkpoint["sampler_path"])) < NATS
    assert divergence(tmp_path / "base") > 0.5


def test_reward_model(recipes: Sdk, server: ServerProcess, root: Path) -> None:
    """A policy is taught, then a model that compares; the second rewards the first, and all three are trained."""
    recipes.run(
        arguments(
            "preference.rlhf.rlhf_pipeline", base_model=MODEL, short_name="eggs",
            lora_rank=16, batch_size=4, max_length=256, sft_learning_rate=1e-3, rm_learning_rate=1e-3,
            rl_group_size=2, rl_max_tokens=8, save_every=0, eval_every=0, max_steps=3,
        ),
        server.url,
    )  # fmt: skip
    logs = root / "runs" / "rlhf-eggs"
    for stage in ("sft", "rm"):
        losses = metric(logs / stage, "train_mean_nll")
        assert len(losses) == 3 and losses[-1] < 0.5 * losses[0], (stage, losses)
    divergences = metric(logs / "rl", "optim/kl_sample_train_v1")
    assert len(divergences) == 3 and max(abs(each) for each in divergences) < NATS


def test_decisions(recipes: Sdk, server: ServerProcess, tmp_path: Path) -> None:
    """A loss of the client on the probabilities of two tokens; the sampler's say the same after training."""
    markets = tmp_path / "markets.csv"
    hub.write_forecasts(markets)
    log = tmp_path / "log"
    recipes.run(
        arguments(
            "decisions.forecasting", model_name=MODEL, log_path=log, data_path=markets, max_validation_questions=4,
            lora_rank=16, batch_size=4, learning_rate=5e-4, max_steps=3, eval_every=0,
        ),
        server.url,
    )  # fmt: skip
    losses = metric(log, "train/loss")
    assert len(losses) == 3 and losses[-1] < 0.5 * losses[0], losses
    before, after = metric(log, "test/brier_reward")
    assert before < 0.7 and after > 0.9, (before, after)
