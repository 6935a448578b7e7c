"""Replay of a real transformer: every bit again in another process, and what differs where that is not like it."""

from contextlib import closing
from pathlib import Path

import pytest

from tests.support.tiny_model import write_tiny_model
from tinkerbell import replay
from tinkerbell.cli.main import run as command_line
from tinkerbell.cli.process import ServerProcess
from tinkerbell.config import Settings
from tinkerbell.replay import DatabaseLog, ExecutorChoice
from tinkerbell.replay.log import blob_of
from tinkerbell.scheduler.environments import tolerance_of
from tinkerbell.sdk import Client, supervised

STEPS = 3


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Two adapters that train at once on a tiny Llama, one of them saved after its second step."""
    directory = tmp_path_factory.mktemp("hf")
    model = write_tiny_model(directory / "model")
    settings = Settings(data_dir=str(directory / "data"))
    environment = {"TINKERBELL_CHUNK_TOKENS": "32", "TINKERBELL_BATCH_TOKENS": "200"}
    with (
        ServerProcess(Path(settings.data_dir), ["--model", str(model), "--threads", "1"], environment=environment) as s,
        Client(s.url) as client,
    ):
        adapters = [
            client.add_lora(rank=4, targets=targets, seed=seed, name=name)
            for seed, (name, targets) in enumerate({"one": ["q_proj", "v_proj"], "two": ["all-linear"]}.items())
        ]
        futures = []
        for step in range(STEPS):
            for number, adapter in enumerate(adapters):
                data = [supervised([(7 * number + 3 * step + i) % 120 + 1 for i in range(n)]) for n in (5, 23, 40, 9)]
                futures += [adapter.forward_backward(data), adapter.optim_step(learning_rate=1e-2, grad_clip_norm=1.0)]
                futures.append(adapter.sample([1, 2, 3], max_tokens=5, num_samples=2, temperature=0.9))
                if step == 1 and number == 1:
                    futures.append(adapter.save("second"))
        for future in futures:
            future.result()
    return settings


def test_every_bit_again(recorded: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "two.zip"
    assert command_line(["replay", "export", "two", "--out", str(file), "--data-dir", recorded.data_dir]) == 0
    assert command_line(["replay", "verify", str(file), "--samples"]) == 2
    assert "--trust-archive" in capsys.readouterr().err
    assert command_line(["replay", "verify", str(file), "--samples", "--trust-archive"]) == 0
    assert f"every bit as recorded up to step {STEPS}" in capsys.readouterr().out


def test_another_thread_count_is_named(recorded: Settings) -> None:
    with closing(DatabaseLog.open(recorded)) as log:
        report = replay.verify(log, "one", choice=ExecutorChoice(threads=2))
    assert [(each.fact, each.recorded, each.found) for each in report.differences] == [("threads", "1", "2")]
    assert report.verdict == "within tolerance" and report.num_compared > 0
    assert report.deviations.loss < tolerance_of("float32").loss(0)


def test_a_state_is_an_adapter_directory(recorded: Settings, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    with closing(DatabaseLog.open(recorded)) as log:
        found = replay.state_at(log, "two", "step:2")
        (saved,) = [each.recorded for each in log.entries(types=["save.completed"])]
        replay.write_adapter(found.state, tmp_path)
        assert (tmp_path / "adapter_model.safetensors").read_bytes() == blob_of(log, saved.blobs["weights"])
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
