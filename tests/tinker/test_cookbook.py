"""Recipes of tinker-cookbook, unmodified, with the real model: their own numbers have to go the right way."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.real_model import real_model_directory
from tests.support.rounding import NATS
from tests.tinker.conftest import CLIENTS, TIMEOUT_S, Sdk
from tests.tinker.recipes import arguments, metric
from tinkerbell.cli.process import ServerProcess

pytestmark = [pytest.mark.tinker, pytest.mark.timeout(900)]
RENDERER = "qwen3_instruct"


def recipe(name: str, log: Path, **settings: object) -> list[str]:
    """Arguments of a recipe."""
    common = {"model_name": real_model_directory(), "renderer_name": RENDERER, "log_path": log}
    return arguments(name, **(common | settings))


def test_supervised_chat_and_its_resume(sdk: Sdk, server: ServerProcess, tmp_path: Path) -> None:
    """Ended in the middle, it goes on from its last checkpoint; the loss falls."""
    where = sdk.run(
        ["-c", "import tinker_cookbook, pathlib; print(pathlib.Path(tinker_cookbook.__file__).parent)"], server.url
    )
    log = tmp_path / "chat_sl"
    chat = recipe(
        "chat_sl.train", log,
        lora_rank=16, dataset=f"{where.strip()}/example_data/conversations.jsonl", batch_size=8, max_length=512,
        max_steps=10, save_every=3, eval_every=0, infrequent_eval_every=0, learning_rate=5e-4,
    )  # fmt: skip
    process = sdk.spawn([*chat, "behavior_if_log_dir_exists=delete"], server.url)
    deadline = time.monotonic() + TIMEOUT_S
    while not ((log / "metrics.jsonl").exists() and len(metric(log, "train_mean_nll")) >= 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    output = sdk.run([*chat, "behavior_if_log_dir_exists=resume"], server.url)
    losses = metric(log, "train_mean_nll")
    assert len(losses) >= 10, output[-3000:]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses


def test_reinforcement_on_arithmetic(sdk: Sdk, server: ServerProcess, tmp_path: Path) -> None:
    """The reward rises; sampler and trainer agree on every logprob."""
    log = tmp_path / "math_rl"
    sdk.run(
        recipe(
            "math_rl.train", log,
            lora_rank=16, env="arithmetic", group_size=8, groups_per_batch=8, max_tokens=8, max_steps=8,
            save_every=0, eval_every=0, loss_fn="importance_sampling", learning_rate=3e-4,
            behavior_if_log_dir_exists="delete",
        ),
        server.url,
    )  # fmt: skip
    rewards = metric(log, "env/all/reward/total")
    assert len(rewards) == 8
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.02, rewards
    assert max(abs(each) for each in metric(log, "optim/kl_sample_train_v1")) < NATS


def test_preferences(sdk: Sdk, server: ServerProcess, tmp_path: Path) -> None:
    """DPO, whose loss is computed in the client: the margin grows."""
    sdk.run([str(CLIENTS / "dpo.py"), str(tmp_path)], server.url)
    margins = metric(tmp_path / "log", "margin")
    assert margins[0] == pytest.approx(0.0, abs=1e-3) and margins[-1] > 0.3, margins


def test_self_distillation(sdk: Sdk, server: ServerProcess, tmp_path: Path) -> None:
    """The teacher's likeliest tokens are several weighted targets at each position."""
    data = tmp_path / "tools"
    made = [
        {"prompt": f"Which tool adds {n} and {n + 1}?", "golden_response": ["Use add.", f"add({n})"]} for n in range(12)
    ]
    sdk.run(["-c", f"import datasets; datasets.Dataset.from_list({made!r}).save_to_disk({str(data)!r})"], server.url)
    log = tmp_path / "sdft"
    sdk.run(
        recipe(
            "sdft.train", log,
            lora_rank=16, dataset="toolalpaca", toolalpaca_data_path=data, groups_per_batch=4, max_tokens=24,
            topk=8, max_steps=2, eval_every=0, save_every=0, learning_rate=3e-4, behavior_if_log_dir_exists="delete",
        ),
        server.url,
    )  # fmt: skip
    assert metric(log, "sdft/topk") == [8.0, 8.0] and min(metric(log, "grad_norm")) > 0
    assert min(metric(log, "sdft/mean_teacher_entropy")) > 0


def test_the_shorter_is_the_better(sdk: Sdk, server: ServerProcess, tmp_path: Path) -> None:
    """Samples are compared in pairs; each turn of a trajectory is sampled for itself."""
    log = tmp_path / "shorter"
    sdk.run(
        recipe(
            "preference.shorter.train", log, batch_size=2, group_size=4, max_tokens=16, max_steps=2, eval_every=0,
            behavior_if_log_dir_exists="delete",
        ),
        server.url,
    )  # fmt: skip
    rewards = metric(log, "env/all/reward/total")
    assert len(rewards) == 2 and all(-1 <= reward <= 1 for reward in rewards), rewards


def test_the_command_line(sdk: Sdk, server: ServerProcess) -> None:
    """`tinker` itself: what there is, as JSON."""
    command = sdk.python.parent / "tinker"
    assert command.exists()
    output = sdk.run(["-m", "tinker.cli", "--format", "json", "run", "list"], server.url)
    assert json.loads(output[output.index("{") :])["runs"]
    assert subprocess.run([command, "--help"], check=False, capture_output=True).returncode == 0
