"""What the tinker SDK was recorded to send, sent to our server: the same status, and an answer of the same shape.

The exchanges are in tests/golden/tinker. Their requests are the SDK's own; the numbers in their answers were made up,
so only shapes count. Ids are replaced by those of things that were made here.
"""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf import json_format

from tests.support.server import fake_server
from tinkerbell.api.tinker import wire_pb2 as pb

EXCHANGES = Path(__file__).parents[2] / "golden" / "tinker"
MODEL = "fake"

LEFT_OUT = {
    "made to fail, or answered before its time, by the server it was recorded with": (
        "POST_asample.429",
        "POST_client_config.401",
        "POST_client_config.404",
        "POST_client_dynamic_config.404",
        "POST_forward_backward.cross_entropy.400",
        "POST_forward_backward.cross_entropy.422",
        "POST_forward_backward.cross_entropy.500",
        "POST_retrieve_future.CreateModel.error.None.404",
        "POST_retrieve_future.CreateModel.error.None.500",
        "POST_retrieve_future.CreateModel.error.user",
        "POST_retrieve_future.CreateModel.try_again.408",
        "POST_retrieve_future.CreateModel.try_again",
        "POST_retrieve_future.ForwardBackward.error.server",
        "POST_retrieve_future.ForwardBackward.error.user",
        "POST_retrieve_future.ForwardBackward.try_again.408",
        "POST_retrieve_future.ForwardBackward.try_again",
    ),
    "sent only after a client config that this server does not give": (
        "POST_auth_token",
        "POST_create_custom_loss",
        "POST_forward_backward.custom",
        "POST_retrieve_future.CreateCustomLoss.create_custom_loss",
        "POST_retrieve_future.ForwardBackward.complete_metadata",
    ),
    "recorded in part only": (
        "POST_asample.target",
        "POST_forward_backward.cispo.spans",
        "POST_forward_backward.gspo",
        "POST_forward_backward.importance_sampling.spans",
        "POST_forward_backward.stable_reinforce.spans",
    ),
}
ALL = sorted(path.stem for path in EXCHANGES.glob("*.json"))
REPLAYED = [name for name in ALL if not any(name in names for names in LEFT_OUT.values())]

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_ALWAYS_NULLABLE = {"user_metadata", "expires_at", "tokenizer_id", "arch", "model_path", "path", "cursor"}


class World:
    """A server on which everything was made that the exchanges ask for."""

    def __init__(self, url: str) -> None:
        headers = {"X-API-Key": "tml-test"}
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers=headers, timeout=60)
        self.seqs = iter(range(1000, 10_000))
        asked = {"sdk_version": "0.38.0", "user_metadata": {"who": "example"}, "display_name": "example run"}
        self.session = self.post("create_session", {**asked, "tags": []})["session_id"]
        self.model = f"{self.session}:train:0"
        self.sampler = f"{self.session}:sample:0"
        lora = {"rank": 16, "seed": 7, "train_unembed": False, "train_mlp": True, "train_attn": True}
        made = {"session_id": self.session, "model_seq_id": 0, "base_model": MODEL, "lora_config": lora}
        self.futures = {"CreateModel": self.submit("create_model", made | {"user_metadata": {"run": "a"}})}
        for seq, (route, name) in enumerate(
            [
                ("save_weights", "step-1"),
                ("save_weights", "final"),
                ("save_weights_for_sampler", "sampler-1"),
                ("save_weights_external", "ext-1"),
                ("save_weights_external", "download"),
            ]
        ):
            body = {"model_id": self.model, "seq_id": seq, "path": name}
            if name == "step-1":
                body |= {"ttl_seconds": 7200, "user_metadata": {"k": "v"}}
            kind = {"save_weights_for_sampler": "named", "save_weights_external": "SaveWeightsExternal"}
            self.futures[kind.get(route, "SaveWeights")] = self.submit(route, body)
        ephemeral = {"model_id": self.model, "seq_id": 9, "sampling_session_seq_id": 0}
        self.futures["SaveWeightsForSampler"] = self.submit("save_weights_for_sampler", ephemeral)
        self.wait()
        path = {"session_id": self.session, "sampling_session_seq_id": 2, "model_path": self.path("sampler-1")}
        self.post("create_sampling_session", path)
        for kind, recorded in (("Forward", "cross_entropy.forward_only"), ("ForwardBackward", "cross_entropy")):
            self.futures[kind] = self.send(f"POST_forward_backward.{recorded}").json()["request_id"]
        step = {"model_id": self.model, "seq_id": 20, "adam_params": {"learning_rate": 1e-3}}
        self.futures["OptimStep"] = self.submit("optim_step", step)
        load = {"model_id": self.model, "seq_id": 21, "path": self.path("step-1", "weights"), "optimizer": True}
        self.futures["LoadWeights"] = self.submit("load_weights", load)
        self.futures["Sample"] = self.send("POST_asample.logprobs").json()["request_id"]
        self.wait()

    def wait(self) -> None:
        for request_id in self.futures.values():
            assert "error" not in str(self.http.post("retrieve_future", json={"request_id": request_id}).content)

    def path(self, name: str, kind: str = "sampler_weights") -> str:
        return f"tinker://{self.model}/{kind}/{name}"

    def post(self, route: str, body: Any) -> Any:
        answer = self.http.post(route, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def submit(self, route: str, body: Any) -> str:
        request_id: str = self.post(route, body)["request_id"]
        return request_id

    def send(self, name: str) -> httpx.Response:
        """A recorded request, with our ids in the place of its own."""
        request = exchange(name)["request"]
        path = _UUID.sub(self.session, request["path"].removeprefix("/api/v1/"))
        if name.startswith("GET_samplers"):
            path = f"samplers/{self.session}:sample:2"
        body, query = request["body"], request["query"]
        if body is None:
            return self.http.request(request["method"], path, params=query)
        if "proto" in body:
            raw = self._protobuf(body)
            return self.http.post(path, content=raw, headers={"Content-Type": "application/x-protobuf"})
        if "request_id" in body:
            of = "Sample" if name == "POST_cancel_future" else name.split(".")[1]
            body = {**body, "request_id": self.futures[of]}
        text = _UUID.sub(self.session, json.dumps(body)).replace('"smollm2-135m-instruct"', f'"{MODEL}"')
        asked = json.loads(text)
        for counter in ("seq_id", "model_seq_id", "sampling_session_seq_id"):
            if counter in asked:
                asked[counter] = next(self.seqs)
        if path.startswith("save_weights") and "path" in asked:
            asked["path"] += "-again"
        if "prompt" in asked:
            asked["prompt"]["chunks"][0]["tokens"] = [28120, 905, 28]
        return self.http.request(request["method"], path, json=asked, params=query)

    def _protobuf(self, body: dict[str, Any]) -> bytes:
        message = pb.ForwardBackwardRequest()
        if "raw_b64" in body and not body["raw_b64"].startswith("KLUv"):
            message.ParseFromString(base64.b64decode(body["raw_b64"]))
        else:
            json_format.ParseDict(body["json"], message)
        message.model_id, message.seq_id = self.model, next(self.seqs)
        return message.SerializeToString()


def exchange(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXCHANGES / f"{name}.json").read_text())
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    options = ("vocab_size=49152", "max_length=8192")
    flags = [flag for option in options for flag in ("--executor-option", option)]
    with fake_server(tmp_path_factory.mktemp("tinker"), *flags) as server:
        made = World(server.url)
        yield made
        made.http.close()


def test_every_exchange_has_its_place() -> None:
    assert len(ALL) == 88
    for names in LEFT_OUT.values():
        assert set(names) <= set(ALL)


# Those that delete come last.
@pytest.mark.parametrize("name", sorted(REPLAYED, key=lambda name: (name.startswith("DELETE"), "finish" in name, name)))
def test_the_answer_has_the_recorded_shape(world: World, name: str) -> None:
    recorded = exchange(name)["response"]
    answer = world.send(name)
    assert answer.status_code == recorded["status"], answer.text
    if recorded["body"] is None:
        assert not answer.content
    elif "proto" in recorded["body"]:
        assert answer.headers["content-type"] == "application/x-protobuf"
        message = getattr(pb, recorded["body"]["proto"])()
        message.ParseFromString(answer.content)
        found = json_format.MessageToDict(message, preserving_proto_field_name=True)
        same_shape(name, recorded["body"]["json"], found)
    else:
        assert answer.headers["content-type"].startswith("application/json")
        same_shape(name, recorded["body"], answer.json())


def same_shape(where: str, recorded: Any, found: Any) -> None:
    """What the SDK was given it is given here; more is fine."""
    key = where.rpartition(".")[2]
    if recorded is None or (found is None and key in _ALWAYS_NULLABLE):
        return
    assert type(found) is type(recorded), (where, recorded, found)
    if isinstance(recorded, dict):
        free = key in {"metrics", "user_metadata", "urls"}
        for name in recorded:
            if free and name not in found:
                continue
            assert name in found or name in _ALWAYS_NULLABLE, (where, name, found)
            same_shape(f"{where}.{name}", recorded[name], found.get(name))
    elif isinstance(recorded, list):
        for one in found[:1]:
            same_shape(f"{where}[]", recorded[0], one)
    elif isinstance(recorded, str) and recorded.startswith("tinker://"):
        assert found.startswith("tinker://")
