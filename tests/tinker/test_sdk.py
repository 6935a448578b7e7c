"""The unmodified tinker SDK drives a real server with the real model."""

import json
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.support.peft_reference import quietly
from tests.support.real_model import real_model_directory
from tests.support.rounding import EPS, NATS, assert_missed_like
from tests.support.server import fake_server
from tests.tinker.conftest import CLIENTS, TIMEOUT_S, Sdk, real_server
from tinkerbell.cli.process import ServerProcess
from tinkerbell.config import Settings
from tinkerbell.events import kinds
from tinkerbell.events.store import EventStore

pytestmark = [pytest.mark.tinker, pytest.mark.timeout(900)]


@pytest.mark.parametrize("way", ["sync", "async"])
def test_every_call_that_is_served(sdk: Sdk, server: ServerProcess, way: str) -> None:
    done = sdk.client("calls", server.url, way)
    assert len(done) == len(set(done)) >= 43


def test_wrong_keys_are_refused_at_once(sdk: Sdk, tmp_path: Path) -> None:
    with fake_server(tmp_path / "keys", "--auth", "keys") as server:
        process = sdk.spawn([str(CLIENTS / "crowd.py")], server.url, key="tml-tb-k_nobody-0123456789abcdef")
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0 and "AuthenticationError" in output and "not valid" in output


def test_other_releases_get_the_same_numbers(sdk: Sdk, tmp_path: Path) -> None:
    """The oldest that speaks the protocol, the first that wants ids of samples, the last before the environment's."""
    with fake_server(tmp_path / "releases") as server:
        expected = sdk.client("release", server.url, model="fake")
        for release in ("0.25.0", "0.30.4", "0.36.0"):
            found = replace(sdk, release=release).client("release", server.url, model="fake")
            assert found == expected | {"release": release}
        losses = expected["losses"]
        assert losses == sorted(losses, reverse=True) and losses[0] > 1.2 * losses[-1]
        process = replace(sdk, release="0.24.1").spawn([str(CLIENTS / "release.py")], server.url, model="fake")
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0 and "install tinker>=0.25" in output, output[-3000:]


def test_numbers_are_those_of_hf_and_peft(
    sdk: Sdk, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("OUT", str(tmp_path))
    found = sdk.client("figures", server.url)
    before, after = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after")
    )

    def reference(dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logprobs [N] of the text, and the gradient of DPO by the names of `before`."""
        base = AutoModelForCausalLM.from_pretrained(str(real_model_directory()), dtype=dtype)
        load = partial(PeftModel.from_pretrained, is_trainable=True)
        model: Any = quietly(load, base, str(tmp_path / "before")).to(dtype).eval()

        def logprobs(ids: list[int]) -> torch.Tensor:
            tokens = torch.tensor(ids)
            logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
            return torch.log_softmax(logits, -1).gather(-1, tokens[1:, None]).squeeze(-1)

        gains = [
            logprobs(found[name]).sum() - given
            for name, given in zip(("chosen", "rejected"), found["reference"], strict=True)
        ]
        (-torch.nn.functional.logsigmoid(0.1 * (gains[0] - gains[1]))).backward()
        gradient = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
        return logprobs(found["ids"]).detach(), gradient

    (rounded, rounded_gradient), (exact, exact_gradient) = reference(torch.float32), reference(torch.float64)
    assert_missed_like(found["logprobs"], rounded, exact, "logprobs")
    # What the sampler said of its own tokens, and the trainer of the same ones.
    assert all(abs(ratio - 1) < NATS for ratios in found["ratios"] for ratio in ratios)

    def flat(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([gradient[name].reshape(-1).double() for name in sorted(exact_gradient)])

    moved = {n: (before[n].double() - after[n].double()) / found["learning_rate"] for n in exact_gradient}
    # A moved weight is rounded to fp32: what is had of its gradient is off by that, too.
    kept = {n: rounded_gradient[n].double() + EPS * before[n] / found["learning_rate"] for n in exact_gradient}
    ours = {n: by / (1 - by.abs()) for n, by in moved.items()}
    assert_missed_like(flat(ours), flat(kept), flat(exact_gradient), "gradient")
    norms = (flat(gradient).norm() for gradient in (rounded_gradient, exact_gradient))
    assert_missed_like([found["grad_norm"]], *([norm] for norm in norms), "norm of the gradient")


def test_a_killed_server_is_ridden_over(sdk: Sdk, tmp_path: Path) -> None:
    """The trajectory is that of a run whose server was left alone, to the bit."""
    with real_server(tmp_path / "calm") as server:
        calm = sdk.client("loop", server.url)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--port", str(port))
    with real_server(tmp_path / "killed", *options) as server:
        lines = []
        with sdk.spawn([str(CLIENTS / "loop.py")], server.url) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if line.startswith("step 4"):
                    server.kill()
                    server.start()
            assert process.wait(TIMEOUT_S) == 0, "".join(lines)
    assert json.loads(lines[-1]) == calm


def test_a_full_line_holds_the_sdk_back(sdk: Sdk, tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("[limits]\nmax_pending_requests = 64\n")
    with fake_server(tmp_path / "data", "--config", str(config), latency_us=20_000) as server:
        tokens = sdk.client("crowd", server.url, model="fake")
        log = server.log_file.read_text()
    assert tokens == [2] * 300
    assert "Traceback" not in log


def test_samples_that_are_given_up_do_not_run(sdk: Sdk, tmp_path: Path) -> None:
    with fake_server(tmp_path, latency_us=4_000_000) as server:
        assert sdk.client("given_up", server.url, model="fake") == [2, 19]
    store = EventStore.open(Settings(data_dir=str(tmp_path)))
    try:
        cancelled, completed, failed = (
            store.read(types=[f"sample.{what}"]) for what in ("cancelled", "completed", "failed")
        )
        assert store.check().num_pending == 0
    finally:
        store.close()
    # The one that ran first may be one of the given up.
    assert len(cancelled) == 19 and len(completed) <= 2 and len(failed) == 20 - len(completed)
    assert {each.event.code for each in failed if isinstance(each.event, kinds.SampleFailed)} == {"cancelled"}
