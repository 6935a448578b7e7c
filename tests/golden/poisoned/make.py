"""Makes `tests/golden/poisoned/*.tar.zst`: data directories of a release that could not read its own log.

Run it with that release on PYTHONPATH (the last one that takes what it cannot give back is b540150) and a directory to
write to. Nothing here is a test; the archives are kept as they were made.
"""

import io
import json
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import httpx
import zstandard

from tinkerbell.api.tinker import wire_pb2 as pb
from tinkerbell.cli.process import ServerProcess

POISON: list[Any] = ["", ["", "END"], ["x"] * 17, "y" * 257, list(range(65)), [-1], [-(2**70)]]
"""What `stop` may not be."""
LARGEST = 1.7976931348623157e308


class Caller:
    """The tinker protocol as one tenant."""

    def __init__(self, url: str, key: str) -> None:
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers={"X-API-Key": f"tml-{key}"}, timeout=60)
        self.session = self.post("create_session", sdk_version="0.38.0", tags=[])["session_id"]

    def post(self, route: str, **body: Any) -> dict[str, Any]:
        found = self.http.post(route, json=body)
        assert found.status_code == 200, found.text
        return dict(found.json())

    def wait(self, request_id: str) -> httpx.Response:
        while True:
            found = self.http.post("retrieve_future", json={"request_id": request_id})
            if found.status_code != 408:
                assert found.status_code == 200, found.text
                return found

    def model(self) -> str:
        lora = {"rank": 2, "seed": 1, "train_unembed": False, "train_attn": False}
        made = self.post("create_model", session_id=self.session, model_seq_id=0, base_model="fake", lora_config=lora)
        self.wait(made["request_id"])
        return str(made["model_id"])

    def forward_backward(self, model: str, seq: int, data: list[dict[str, float]], **more: Any) -> str:
        loss = "importance_sampling" if "logprobs" in data[0] else "cross_entropy"
        request = pb.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn=loss, **more)
        for inputs in data:
            datum = request.data.add()
            datum.model_input.add().encoded_text.tokens = struct.pack("<4i", 1, 2, 3, 4)
            targets = pb.Tensor(dense=struct.pack("<4q", 2, 3, 4, 5), dtype=pb.DTYPE_INT64, shape=[4])
            datum.loss_fn_inputs["target_tokens"].CopyFrom(targets)
            for name, value in inputs.items():
                tensor = pb.Tensor(dense=struct.pack("<4f", *[value] * 4), dtype=pb.DTYPE_FLOAT32, shape=[4])
                datum.loss_fn_inputs[name].CopyFrom(tensor)
        headers = {"Content-Type": "application/x-protobuf"}
        found = self.http.post("forward_backward", content=request.SerializeToString(), headers=headers)
        assert found.status_code == 200, found.text
        return str(found.json()["request_id"])

    def optim_step(self, model: str, seq: int) -> str:
        return str(self.post("optim_step", model_id=model, seq_id=seq, adam_params={})["request_id"])

    def sample(self, sampler: str, seq: int, stop: Any) -> str:
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
        params = {"max_tokens": 4, "temperature": 0.0} | ({} if stop is None else {"stop": stop})
        body = {"sampling_session_id": sampler, "seq_id": seq, "prompt": prompt, "sampling_params": params}
        return str(self.post("asample", **body)["request_id"])


def train(caller: Caller) -> str:
    model = caller.model()
    for step in range(2):
        caller.wait(caller.forward_backward(model, 2 * step + 1, [{"weights": 1.0}]))
        caller.wait(caller.optim_step(model, 2 * step + 2))
    return model


def stops(poisoned: Caller, other: Caller) -> None:
    """Samples that the log took and cannot give back, and what waits behind them."""
    model, theirs = train(poisoned), train(other)
    path = poisoned.wait(poisoned.post("save_weights_for_sampler", model_id=model, seq_id=5, path="s")["request_id"])
    made = {"session_id": poisoned.session, "sampling_session_seq_id": 0}
    sampler = poisoned.post("create_sampling_session", model_path=path.json()["path"], **made)["sampling_session_id"]
    made["sampling_session_seq_id"] = 1
    base = poisoned.post("create_sampling_session", base_model="fake", **made)["sampling_session_id"]
    for seq, stop in enumerate(POISON):
        poisoned.sample(sampler if seq % 2 else base, seq, stop)
    poisoned.sample(sampler, 100, None)
    poisoned.sample(base, 100, None)
    poisoned.forward_backward(model, 6, [{"weights": 1.0}])
    poisoned.optim_step(model, 7)
    other.forward_backward(theirs, 5, [{"weights": 1.0}])
    other.optim_step(theirs, 6)


def sums(poisoned: Caller, other: Caller) -> None:
    """Two chunks whose metrics are finite, and whose sum is not."""
    model, theirs = train(poisoned), train(other)
    inputs = {"logprobs": -680.0, "advantages": 0.0, "weights": 1.0}
    probe = pb.ForwardBackwardOutput.FromString(poisoned.wait(poisoned.forward_backward(model, 5, [inputs])).content)
    weight = 0.6 * LARGEST / probe.metrics["ratio:sum"]
    for seq, forward_only in ((6, True), (7, False)):
        poisoned.forward_backward(model, seq, [inputs | {"weights": weight}] * 2, forward_only=forward_only)
    poisoned.optim_step(model, 8)
    other.forward_backward(theirs, 5, [{"weights": 1.0}])
    other.optim_step(theirs, 6)
    time.sleep(2.0)


def main() -> None:
    for make in (stops, sums):
        data_dir = Path(sys.argv[1]) / make.__name__
        data_dir.mkdir(parents=True)
        command = [sys.executable, "-m", "tinkerbell", "keys", "create", "--data-dir", str(data_dir), "--json"]
        made = [subprocess.run([*command, tenant], check=True, capture_output=True) for tenant in ("alice", "bob")]
        secrets = [json.loads(each.stdout)["key"] for each in made]
        (data_dir / "tinkerbell.toml").write_text("chunk_tokens = 4\n")
        options = ["--executor", "fake", "--config", str(data_dir / "tinkerbell.toml")]
        server = ServerProcess(data_dir, options)
        server.start()
        try:
            make(*(Caller(server.url, secret) for secret in secrets))
        finally:
            server.stop()
        (data_dir / "keys.json").write_text(json.dumps(dict(zip(("alice", "bob"), secrets, strict=True))))
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for path in sorted(data_dir.rglob("*")):
                if path.suffix not in (".log", ".ready") and path.is_file():
                    archive.add(path, str(path.relative_to(data_dir)))
        target = Path(sys.argv[1]) / f"{make.__name__}.tar.zst"
        target.write_bytes(zstandard.compress(packed.getvalue(), 19))


if __name__ == "__main__":
    main()
