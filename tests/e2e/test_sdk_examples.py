"""Every example runs as it stands, against a server with a tiny model and the real model's tokenizer."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.real_model import real_model_directory
from tests.support.tiny_model import write_tiny_model
from tinkerbell.cli.process import ServerProcess

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("examples")
    model = write_tiny_model(directory / "model", vocab_size=49152, tie_word_embeddings=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).write_bytes((real_model_directory() / name).read_bytes())
    with ServerProcess(directory / "data", ["--model", str(model), "--threads", "1"]) as server:
        yield server.url


def run(example: str, url: str, directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example)],
        cwd=directory,
        env={**os.environ, "TINKERBELL_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_supervised(url: str, tmp_path: Path) -> None:
    losses = numbers(r"loss per token ([\d.]+)", run("supervised.py", url, tmp_path))
    assert len(losses) == 15
    assert losses[-1] < losses[0]
    assert {file.name for file in (tmp_path / "gardener-adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_reinforce(url: str, tmp_path: Path) -> None:
    rewards = numbers(r"reward ([\d.]+)", run("reinforce.py", url, tmp_path))
    assert len(rewards) == 16
    assert all(0 <= reward <= 1 for reward in rewards)


def test_resume_from_checkpoint(url: str, tmp_path: Path) -> None:
    text = run("resume_from_checkpoint.py", url, tmp_path)
    pairs = re.findall(r"step \d+: (\w{16}) (\w{16})", text)
    assert len(pairs) == 5
    assert all(one == other for one, other in pairs)
    assert "back at step 5" in text


def test_several_adapters(url: str, tmp_path: Path) -> None:
    text = run("several_adapters.py", url, tmp_path)
    for rate in ("0.0003", "0.001", "0.003"):
        losses = numbers(rf"rate {rate}  step \d+  loss per token ([\d.]+)", text)
        assert len(losses) == 10
        assert losses[-1] < losses[0]


def test_every_example_is_run() -> None:
    run_here = {"supervised.py", "reinforce.py", "resume_from_checkpoint.py", "several_adapters.py"}
    assert {file.name for file in EXAMPLES.glob("*.py")} == run_here
