"""Rules of the tinker protocol that are easily got wrong: retries, order, errors, owners, how long things are kept."""

import struct
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from tests.support.api_driver import ApiDriver, answer, record_environment
from tinkerbell.api.tinker import wire_pb2 as pb
from tinkerbell.api.tinker.routes import futures
from tinkerbell.config import Settings
from tinkerbell.events import kinds
from tinkerbell.events.store import EventStore

OWNER, STRANGER = "owner", "stranger"
LORA = {"rank": 4, "seed": 1, "train_unembed": False, "train_mlp": True, "train_attn": True}


class Tinker:
    """Calls the protocol as a tenant; requests are answered by hand."""

    def __init__(self, api: ApiDriver, tenant: str = OWNER) -> None:
        self.api, self.tenant = api, tenant

    def call(self, method: str, route: str, **kwargs: Any) -> httpx.Response:
        headers = {"X-API-Key": f"tml-{self.api.key(self.tenant)}", **kwargs.pop("headers", {})}
        return self.api.call(method, f"/api/v1/{route}", headers=headers, **kwargs)

    def post(self, route: str, **body: Any) -> httpx.Response:
        return self.call("POST", route, json=body)

    def ok(self, route: str, **body: Any) -> dict[str, Any]:
        found = self.post(route, **body)
        assert found.status_code == 200, found.text
        decoded: dict[str, Any] = found.json()
        return decoded

    def session(self) -> str:
        session: str = self.ok("create_session", sdk_version="0.38.0", tags=[])["session_id"]
        return session

    def model(self, session: str | None = None, number: int = 0, **changes: Any) -> str:
        """A ready one."""
        body = {"model_seq_id": number, "base_model": "tiny", "lora_config": LORA, **changes}
        made = self.ok("create_model", session_id=session or self.session(), **body)
        answer(self.api.store, int(made["request_id"]))
        model: str = made["model_id"]
        return model

    def forward_backward(self, model: str, seq: int, *, tokens: int = 3, **changes: Any) -> httpx.Response:
        request = message(model, seq, tokens=tokens, **changes)
        headers = {"Content-Type": "application/x-protobuf"}
        return self.call("POST", "forward_backward", content=request.SerializeToString(), headers=headers)

    def saved(self, model: str, seq: int, name: str = "step-1", route: str = "save_weights", **more: Any) -> str:
        """Path of a checkpoint."""
        request_id = self.ok(route, model_id=model, seq_id=seq, path=name, **more)["request_id"]
        event = self.api.store.get(int(request_id))
        assert event is not None and isinstance(event.event, kinds.SaveRequested)
        answer(self.api.store, int(request_id))
        path: str = self.ok("retrieve_future", request_id=request_id)["path"]
        return path


def message(model: str, seq: int, *, tokens: int = 3, loss: str = "cross_entropy", **inputs: Any) -> Any:
    request = pb.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn=loss)
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = struct.pack(f"<{tokens}i", *range(1, tokens + 1))
    targets = struct.pack(f"<{tokens}q", *range(2, tokens + 2))
    datum.loss_fn_inputs["target_tokens"].CopyFrom(pb.Tensor(dense=targets, dtype=pb.DTYPE_INT64, shape=[tokens]))
    for name, value in inputs.items():
        datum.loss_fn_inputs[name].CopyFrom(value)
    return request


@pytest.fixture
def api(settings: Settings, store: EventStore) -> Iterator[ApiDriver]:
    record_environment(store)
    with ApiDriver(msgspec.structs.replace(settings, auth="keys"), store) as driver:
        yield driver


@pytest.fixture
def tinker(api: ApiDriver) -> Tinker:
    return Tinker(api)


# ---- who may come ----------------------------------------------------------------------------------------------------


def test_a_key_passes_with_the_prefix_of_the_sdk_and_no_other_does(tinker: Tinker) -> None:
    assert tinker.post("client/config", sdk_version="0.38.0").status_code == 200
    key = tinker.api.key(OWNER)
    for wrong in ("tml-nothing", f"tml-{key[:-1]}x", ""):
        found = tinker.call("POST", "client/config", json={"sdk_version": "0.38.0"}, headers={"X-API-Key": wrong})
        assert found.status_code == 401 and found.json()["detail"], wrong


def test_a_release_that_speaks_json_is_told_what_to_install(tinker: Tinker) -> None:
    found = tinker.post("client/config", sdk_version="0.18.2")
    assert found.status_code == 400 and "0.18.2" in found.json()["detail"] and "tinker>=0.25" in found.json()["detail"]
    for version in ("0.25.0", "0.38.0", "1.0.0", "dev"):
        assert tinker.post("client/config", sdk_version=version).status_code == 200


def test_what_is_anothers_is_not_there(tinker: Tinker) -> None:
    """Every route that names something, called by a stranger: 404, and nothing is written."""
    stranger = Tinker(tinker.api, STRANGER)
    model = tinker.model()
    session = model.partition(":")[0]
    path, run = tinker.saved(model, 1), f"training_runs/{model}"
    tinker.saved(model, 2, "ext", "save_weights_external")
    body = {"session_id": session, "sampling_session_seq_id": 0}
    sampler = tinker.ok("create_sampling_session", **body, base_model="tiny")["sampling_session_id"]
    request_id = tinker.ok("optim_step", model_id=model, seq_id=3, adam_params={})["request_id"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1]}]}
    tries: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "session_heartbeat", {"session_id": session}),
        ("POST", f"sessions/{session}/finish", {"reason": {"type": "success"}}),
        ("POST", "create_model", {"session_id": session, "model_seq_id": 7, "base_model": "tiny", "lora_config": LORA}),
        ("POST", "get_info", {"model_id": model}),
        ("POST", "optim_step", {"model_id": model, "seq_id": 9, "adam_params": {}}),
        ("POST", "save_weights", {"model_id": model, "seq_id": 9, "path": "x"}),
        ("POST", "save_weights_external", {"model_id": model, "seq_id": 9, "path": "x"}),
        ("POST", "save_weights_for_sampler", {"model_id": model, "seq_id": 9, "path": "x"}),
        ("POST", "save_weights_for_sampler", {"model_id": model, "seq_id": 9, "sampling_session_seq_id": 9}),
        ("POST", "load_weights", {"model_id": model, "seq_id": 9, "path": path}),
        ("POST", "load_weights", {"session_id": stranger.session(), "model_seq_id": 0, "path": path}),
        ("POST", "create_sampling_session", {**body, "base_model": "tiny"}),
        (
            "POST",
            "create_sampling_session",
            {"session_id": stranger.session(), "sampling_session_seq_id": 1, "model_path": path},
        ),
        (
            "POST",
            "asample",
            {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "sampling_params": {"max_tokens": 1}},
        ),
        ("POST", "retrieve_future", {"request_id": request_id}),
        ("POST", "weights_info", {"tinker_path": path}),
        ("GET", run, {}),
        ("GET", f"{run}/checkpoints", {}),
        ("DELETE", f"{run}/checkpoints/weights/step-1", {}),
        ("POST", f"{run}/checkpoints/weights/step-1/publish", {}),
        ("DELETE", f"{run}/checkpoints/weights/step-1/publish", {}),
        ("PUT", f"{run}/checkpoints/weights/step-1/ttl", {"ttl_seconds": 5}),
        ("GET", f"{run}/checkpoints/external_weights/ext/external_weights_urls", {}),
        ("GET", f"sessions/{session}", {}),
        ("GET", f"samplers/{sampler}", {}),
    ]
    head = tinker.api.store.head()
    for method, route, sent in tries:
        found = stranger.call(method, route, **({"json": sent} if sent else {}))
        assert found.status_code == 404, (method, route, found.text)
    assert stranger.forward_backward(model, 9).status_code == 404
    assert tinker.api.store.head() == head, "nothing was written"
    for route in ("training_runs", "checkpoints"):
        assert session not in stranger.call("GET", route).text
        assert session in tinker.call("GET", route).text
    assert session not in stranger.call("GET", "sessions").text
    routes = {
        (method, route.path)
        for route in tinker.api.app.routes
        if route.path.startswith("/api/v1/")
        for method in getattr(route, "methods", ())
    }
    general = {"client/config", "client/dynamic_config", "healthz", "get_server_capabilities", "create_session"}
    general |= {"telemetry", "create_custom_loss", "training_runs", "checkpoints", "sessions", "downloads"}
    tried = {(method, template(route)) for method, route, _ in tries} | {("POST", "/api/v1/forward_backward")}
    rest = {
        (method, path)
        for method, path in routes - tried
        if method != "OPTIONS" and path.removeprefix("/api/v1/").split("/{")[0] not in general
    }
    assert not rest, "teach this test what they name"


def template(route: str) -> str:
    """The path of a route as the app has it."""
    parts = route.split("/")
    named = {"training_runs": "run_id:str", "sessions": "session_id:str", "samplers": "sampler_id:str"}
    if parts[0] in named and len(parts) > 1:
        parts[1] = f"{{{named[parts[0]]}}}"
    if "checkpoints" in parts[2:3] and len(parts) > 4:
        parts[3:5] = ["{kind:str}", "{name:str}"]
    return "/api/v1/" + "/".join(parts)


# ---- retries and order -----------------------------------------------------------------------------------------------


def test_a_retry_is_the_request_of_the_first_time(tinker: Tinker) -> None:
    session = tinker.session()
    body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": LORA}
    first, again = tinker.ok("create_model", **body), tinker.ok("create_model", **body)
    assert first == again and first["model_id"] == f"{session}:train:0"
    model = first["model_id"]
    answer(tinker.api.store, int(first["request_id"]))
    one, same = tinker.forward_backward(model, 1).json(), tinker.forward_backward(model, 1).json()
    assert one == same
    step = {"model_id": model, "seq_id": 2, "adam_params": {"learning_rate": 0.1}}
    assert tinker.ok("optim_step", **step) == tinker.ok("optim_step", **step)
    save = {"model_id": model, "seq_id": 3, "sampling_session_seq_id": 0}
    assert tinker.ok("save_weights_for_sampler", **save) == tinker.ok("save_weights_for_sampler", **save)
    asked = [event for event in tinker.api.store.read(limit=1000) if isinstance(event.event, kinds.Request)]
    assert [kinds.kind_of(event.event) for event in asked] == ["add_lora", "forward_backward", "optim_step", "save"]
    assert len(tinker.api.store.queries.samplers(OWNER, session)) == 1


def test_the_number_of_another_request_is_refused_for_good(tinker: Tinker) -> None:
    """Not with 409, which the SDK repeats."""
    model = tinker.model()
    assert tinker.forward_backward(model, 1).status_code == 200
    found = tinker.forward_backward(model, 1, tokens=4)
    assert found.status_code == 400 and "another request" in found.json()["detail"]


def test_metadata_has_a_bound(tinker: Tinker) -> None:
    found = tinker.post("create_session", sdk_version="0.38.0", tags=[], user_metadata={"k": "x" * 70_000})
    assert found.status_code == 413 and "65536" in found.json()["detail"]


def test_a_retried_session_is_one(tinker: Tinker) -> None:
    body = {"sdk_version": "0.38.0", "tags": []}
    headers = {"X-Idempotency-Key": "stainless-python-retry-1"}
    made = [tinker.call("POST", "create_session", json=body, headers=headers).json()["session_id"] for _ in range(2)]
    assert made[0] == made[1] != tinker.session()


def test_chunks_come_in_any_order_and_holes_hold_nobody_up(tinker: Tinker) -> None:
    model = tinker.model()
    for seq in (14, 15, 13):
        assert tinker.forward_backward(model, seq).status_code == 200
    assert tinker.forward_backward(model, 16, loss="nothing").status_code == 400
    request_id = tinker.ok("optim_step", model_id=model, seq_id=17, adam_params={})["request_id"]
    for event in tinker.api.store.read(limit=1000, types=["forward_backward.requested"]):
        answer(tinker.api.store, event.position)
    answer(tinker.api.store, int(request_id))
    assert tinker.ok("retrieve_future", request_id=request_id)["metrics"]["grad_norm"] == 0.5


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_can_be_fetched_again(tinker: Tinker) -> None:
    model = tinker.model()
    request_id = tinker.forward_backward(model, 1).json()["request_id"]
    answer(tinker.api.store, int(request_id))
    first, again = (tinker.post("retrieve_future", request_id=request_id).content for _ in range(2))
    assert first == again
    output = pb.ForwardBackwardOutput.FromString(first)
    assert output.metrics["loss:sum"] == 1.5
    assert all(name.count(":") == 1 for name in output.metrics)
    (record,) = output.loss_fn_outputs
    assert len(record.fields["logprobs"].data) == 3 * 4
    assert struct.unpack("<2q", record.fields["logprobs"].offsets) == (0, 12)


def test_what_is_not_answered_yet_is_408_after_a_hold(tinker: Tinker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "HOLD_S", 0.05)
    model = tinker.model()
    request_id = tinker.forward_backward(model, 1).json()["request_id"]
    found = tinker.post("retrieve_future", request_id=request_id)
    assert found.status_code == 408
    assert found.json() == {"type": "try_again", "request_id": request_id, "queue_state": "active"}


def test_a_failure_is_an_answer(tinker: Tinker) -> None:
    model = tinker.model()
    request_id = tinker.forward_backward(model, 1).json()["request_id"]
    failure = kinds.ForwardBackwardFailed(category="user", code="non-finite", message="the loss is not finite")
    answer(tinker.api.store, int(request_id), failure)
    found = tinker.ok("retrieve_future", request_id=request_id)
    assert found == {"error": "the loss is not finite", "category": "user"}


@pytest.mark.parametrize("request_id", ["0", "999999", "-1", "x", "9" * 40, ""])
def test_what_is_no_request(tinker: Tinker, request_id: str) -> None:
    found = tinker.post("retrieve_future", request_id=request_id)
    assert found.status_code == 404 and found.json()["detail"]


# ---- bad data --------------------------------------------------------------------------------------------------------


def dense(values: list[float], shape: list[int], dtype: Any = pb.DTYPE_FLOAT32) -> Any:
    form = {pb.DTYPE_FLOAT32: "f", pb.DTYPE_INT64: "q"}[dtype]
    return pb.Tensor(dense=struct.pack(f"<{len(values)}{form}", *values), dtype=dtype, shape=shape)


def csr(values: list[float], rows: list[int], columns: list[int], shape: list[int]) -> Any:
    found = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=shape)
    found.sparse_csr.values = struct.pack(f"<{len(values)}f", *values)
    found.sparse_csr.crow_indices = struct.pack(f"<{len(rows)}q", *rows)
    found.sparse_csr.col_indices = struct.pack(f"<{len(columns)}q", *columns)
    return found


@pytest.mark.parametrize(
    ("weights", "detail"),
    [
        (dense([1.0, 2.0], [2]), "weights has the shape [2]; for 3 tokens it is [3]"),
        (dense([1.0, 2.0], [3]), "2 numbers for the shape [3]"),
        (dense([1.0, float("nan"), 1.0], [3]), "weights[1] is nan"),
        (pb.Tensor(dense=b"12345", dtype=pb.DTYPE_FLOAT32, shape=[3]), "no whole numbers"),
        (pb.Tensor(dense=b"", dtype=pb.DTYPE_BFLOAT16, shape=[3]), "dtype"),
        (pb.Tensor(dense=b"", dtype=pb.DTYPE_FLOAT32, shape=[-3]), "shape [-3]"),
        (pb.Tensor(dense=b"", dtype=pb.DTYPE_FLOAT32, shape=[2**40]), "shape"),
        (csr([1.0], [0, 1, 1, 1], [5], [3, 1]), "no CSR"),
        (csr([1.0], [0, 2, 1, 1], [0], [3, 1]), "no CSR"),
        (csr([1.0], [0, 1], [0], [3, 1]), "no CSR"),
        (csr([], [], [], [3, 1]), "no CSR"),
        (dense([1.0] * 6, [3, 2]), "weights has the shape [3, 2]; for 3 tokens it is [3]"),
    ],
)
def test_bad_tensors_are_named(tinker: Tinker, weights: Any, detail: str) -> None:
    found = tinker.forward_backward(tinker.model(), 1, weights=weights)
    assert found.status_code == 400 and detail in found.json()["detail"], found.text


def test_a_column_may_be_sparse(tinker: Tinker) -> None:
    model = tinker.model()
    found = tinker.forward_backward(model, 1, weights=csr([0.5, 2.0], [0, 1, 1, 2], [0, 0], [3, 1]))
    assert found.status_code == 200, found.text
    event = tinker.api.store.get(int(found.json()["request_id"]))
    assert event is not None
    body = tinker.api.store.body(event)
    assert isinstance(body, kinds.ForwardBackwardBody)
    assert struct.unpack("<3f", body.data[0].loss_inputs["weights"]) == (0.5, 0.0, 2.0)


def test_a_token_may_have_several_targets(tinker: Tinker) -> None:
    """Sparse or dense; absent cells are token 0 with weight 0. The answer has the shape of the targets."""
    model = tinker.model()
    targets = csr([7.0, 8.0, 9.0], [0, 1, 1, 3], [0, 0, 1], [3, 2])
    targets.sparse_csr.values, targets.dtype = struct.pack("<3q", 7, 8, 9), pb.DTYPE_INT64
    weights = dense([1.0, 0.0, 0.0, 0.0, 0.5, 0.25], [3, 2])
    request_id = tinker.forward_backward(model, 1, target_tokens=targets, weights=weights).json()["request_id"]
    event = tinker.api.store.get(int(request_id))
    assert event is not None and isinstance(event.event, kinds.ForwardBackwardRequested)
    assert event.event.num_targets == 2
    body = tinker.api.store.body(event)
    assert isinstance(body, kinds.ForwardBackwardBody)
    assert struct.unpack("<6i", body.data[0].targets) == (7, 0, 0, 0, 8, 9)
    answer(tinker.api.store, int(request_id))
    found = tinker.call("POST", "retrieve_future", json={"request_id": request_id})
    output = pb.ForwardBackwardOutput()
    output.ParseFromString(found.content)
    logprobs = output.loss_fn_outputs[0].fields["logprobs"]
    assert list(logprobs.trailing_shape) == [2]
    assert len(logprobs.data) == 4 * 6 and struct.unpack("<2q", logprobs.offsets) == (0, 24)


@pytest.mark.parametrize(
    ("inputs", "detail"),
    [
        ({"weights": dense([1.0] * 3, [3])}, "weights has the shape [3]; for 3 tokens it is [3, 2], since data[0]"),
        (
            {"loss": "ppo", "logprobs": dense([1.0] * 6, [3, 2]), "advantages": dense([1.0] * 6, [3, 2])},
            "ppo takes one",
        ),
        ({"target_tokens": dense([1] * 3, [3, 0], pb.DTYPE_INT64)}, "K is 1 to 1024"),
        ({"target_tokens": dense([1] * 3, [3, 10**9], pb.DTYPE_INT64)}, "K is 1 to 1024"),
        ({"target_tokens": dense([1] * 3, [2, 2], pb.DTYPE_INT64)}, "target_tokens has the shape [2, 2]"),
    ],
)
def test_bad_targets_are_named(tinker: Tinker, inputs: dict[str, Any], detail: str) -> None:
    wide = {"target_tokens": dense([1] * 6, [3, 2], pb.DTYPE_INT64)}
    found = tinker.forward_backward(tinker.model(), 1, **(wide | inputs))
    assert found.status_code == 400 and detail in found.json()["detail"], found.text


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"loss": "focal"}, "focal"),
        ({"loss": "ppo"}, "needs 'logprobs'"),
        ({"nothing": dense([1.0] * 3, [3])}, "reads no 'nothing'"),
        ({"tokens": 33}, "takes at most 32"),
        ({"target_tokens": dense([1, 2, 100], [3], pb.DTYPE_INT64)}, "target_tokens[2] is 100"),
        ({"target_tokens": dense([1, 2, -1], [3], pb.DTYPE_INT64)}, "target_tokens[2] is -1"),
    ],
)
def test_bad_data_is_named(tinker: Tinker, change: dict[str, Any], detail: str) -> None:
    found = tinker.forward_backward(tinker.model(), 1, **change)
    assert found.status_code == 400 and detail in found.json()["detail"], found.text


def test_other_bodies(tinker: Tinker) -> None:
    protobuf = {"Content-Type": "application/x-protobuf"}
    for headers, content, status in (
        (protobuf, b"\xff\xff", 400),
        ({"Content-Type": "application/json"}, b"{}", 415),
        ({**protobuf, "Content-Encoding": "zstd"}, b"no zstd", 400),
        ({**protobuf, "Content-Encoding": "br"}, b"", 415),
    ):
        found = tinker.call("POST", "forward_backward", content=content, headers=headers)
        assert found.status_code == status and found.json()["detail"], found.text
    for route, body in (
        ("create_model", {"session_id": 5}),
        ("optim_step", {"model_id": "x", "seq_id": -1}),
        ("asample", {"sampling_session_id": "x"}),
    ):
        found = tinker.post(route, **body)
        assert found.status_code == 400 and found.json()["detail"], found.text
    found = tinker.post("optim_step", model_id=tinker.model(), seq_id=1, optimizer_params={"type": "dimuon"})
    assert found.status_code == 400 and "dimuon" in found.json()["detail"]
    assert "not enabled" in tinker.post("create_custom_loss", name="x").json()["detail"]


# ---- checkpoints and samplers ----------------------------------------------------------------------------------------


def test_a_name_is_taken_until_it_is_overwritten_or_gone(tinker: Tinker) -> None:
    model = tinker.model()
    tinker.saved(model, 1)
    found = tinker.post("save_weights", model_id=model, seq_id=2, path="step-1")
    assert found.status_code == 400 and "already" in found.json()["detail"]
    tinker.saved(model, 3, overwrite=True)
    route = f"training_runs/{model}/checkpoints/weights/step-1"
    assert tinker.call("DELETE", route).status_code == 204
    assert tinker.call("DELETE", route).status_code == 404
    tinker.saved(model, 4)
    for name in ("", "a/b", "../x", "x" * 65, "a b"):
        assert tinker.post("save_weights", model_id=model, seq_id=5, path=name).status_code == 400, name


def test_what_has_expired_is_not_there(tinker: Tinker, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tinker.model()
    path = tinker.saved(model, 1)
    route = f"training_runs/{model}/checkpoints"
    assert tinker.call("PUT", f"{route}/weights/step-1/ttl", json={"ttl_seconds": 60}).status_code == 204
    (row,) = tinker.call("GET", route).json()["checkpoints"]
    assert row["expires_at"] is not None
    assert tinker.call("PUT", f"{route}/weights/step-1/ttl", json={"ttl_seconds": None}).status_code == 204
    (row,) = tinker.call("GET", route).json()["checkpoints"]
    assert row["expires_at"] is None
    assert tinker.call("PUT", f"{route}/weights/step-1/ttl", json={"ttl_seconds": 60}).status_code == 204
    (saved,) = tinker.api.store.queries.checkpoints(OWNER)
    assert saved.expires_us is not None and saved.is_usable(saved.expires_us - 1)
    assert not saved.is_usable(saved.expires_us)
    changed = kinds.CheckpointChanged(checkpoint=saved.id, expires_us=1, published=False)
    tinker.api.store.append(kinds.NewEvent(event=changed, tenant=OWNER, stream=f"tenant/{OWNER}"))
    assert tinker.call("GET", route).json()["checkpoints"] == []
    assert tinker.post("load_weights", model_id=model, seq_id=2, path=path).status_code == 404
    assert tinker.api.post(f"/v1/adapters/{model}/load", OWNER, {"checkpoint": saved.id}).status_code == 404
    tinker.api.store.check()


def test_downloads_need_their_address_and_nothing_else(tinker: Tinker) -> None:
    model = tinker.model()
    tinker.saved(model, 1, "ext", "save_weights_external")
    route = f"training_runs/{model}/checkpoints/external_weights/ext/external_weights_urls"
    urls = tinker.call("GET", route).json()["urls"]
    assert set(urls) == {"adapter_config.json", "adapter_model.safetensors"}
    url = urls["adapter_model.safetensors"]
    found = tinker.api.get(url)
    assert found.status_code == 200 and found.content == b"w" * 1000
    for wrong in (url[:-1] + ("A" if url[-1] != "A" else "B"), url.rpartition("/")[0] + "/x.y", url + "."):
        assert tinker.api.get(wrong).status_code == 404
    assert tinker.call("DELETE", f"training_runs/{model}/checkpoints/external_weights/ext").status_code == 204
    assert tinker.api.get(url).status_code == 404


def test_a_sampler_keeps_the_weights_it_was_made_with(tinker: Tinker) -> None:
    """Sampling from it asks an adapter of its own, made when it is first needed, never the model."""
    model = tinker.model()
    session = model.partition(":")[0]
    save = {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 0}
    request_id = tinker.ok("save_weights_for_sampler", **save)["request_id"]
    sampler = f"{session}:sample:0"
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}, {"type": "encoded_text", "tokens": [3]}]}
    asked = {"sampling_session_id": sampler, "prompt": prompt, "sampling_params": {"max_tokens": 2, "stop": [5]}}
    early = tinker.post("asample", **asked, seq_id=0)
    assert early.status_code == 400 and "not saved (yet)" in early.json()["detail"]
    answer(tinker.api.store, int(request_id))
    assert tinker.ok("retrieve_future", request_id=request_id)["sampling_session_id"] == sampler
    first = tinker.ok("asample", **asked, seq_id=1, num_samples=2)
    assert first["sample_sequence_ids"] == [f"{sampler}:1:0", f"{sampler}:1:1"]
    tinker.ok("asample", **asked, seq_id=2)
    made = tinker.api.store.read(limit=1000, adapter=sampler)
    assert [kinds.kind_of(each.event) for each in made] == ["add_lora", "sample", "sample"]
    event = made[1].event
    assert isinstance(event, kinds.SampleRequested)
    assert event.params.stop_tokens == (5,) and event.params.num_samples == 2 and event.num_tokens == 3
    answer(tinker.api.store, made[0].position)
    answer(tinker.api.store, int(first["request_id"]))
    response = pb.SampleResponse.FromString(tinker.post("retrieve_future", request_id=first["request_id"]).content)
    assert len(response.sequences[0].tokens) == len(response.sequences[0].logprobs) == 16


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"topk_sample_logprobs": 65}, "topk_sample_logprobs is 65"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs is -1"),
        ({"prompt_alt_tokens_k": 2}, "not served"),
        ({"prompt_logprobs_last_n": 4}, "the prompt has 3 tokens"),
        ({"target_prompt_logprobs": {"data": [5], "dtype": "int64", "shape": [3, 1]}}, "it is [2, K]"),
        ({"target_prompt_logprobs": {"data": [5], "dtype": "int64", "shape": [2, 1]}}, "1 numbers"),
        ({"target_prompt_logprobs": {"data": [5, 1.5], "dtype": "int64", "shape": [2, 1]}}, "no tokens"),
        ({"target_prompt_logprobs": {"data": [5, 100], "dtype": "int64", "shape": [2, 1]}}, "is 100"),
        (
            {
                "target_prompt_logprobs": {
                    "data": [5],
                    "dtype": "int64",
                    "shape": [2, 1],
                    "sparse_crow_indices": [0, 1, 1],
                    "sparse_col_indices": [1],
                }
            },
            "no CSR",
        ),
        ({"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}, "image is not served"),
        ({"prompt": {"chunks": []}}, "no tokens"),
        ({"sampling_params": {"max_tokens": 30}}, "takes at most 32"),
    ],
)
def test_bad_samples_are_named(tinker: Tinker, change: dict[str, Any], detail: str) -> None:
    session = tinker.session()
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    sampler = tinker.ok("create_sampling_session", **body)["sampling_session_id"]
    asked = {
        "sampling_session_id": sampler,
        "seq_id": 0,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 2},
    }
    found = tinker.post("asample", **(asked | change))
    assert found.status_code == 400 and detail in found.json()["detail"], found.text


@pytest.mark.parametrize(
    ("stop", "texts", "tokens"),
    [(None, (), None), ([], (), ()), ("\n", ("\n",), None), (["a", "b"], ("a", "b"), None), ([2, 3], (), (2, 3))],
)
def test_stops_in_all_their_forms(tinker: Tinker, stop: Any, texts: Any, tokens: Any) -> None:
    session = tinker.session()
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    sampler = tinker.ok("create_sampling_session", **body)["sampling_session_id"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1]}]}
    params = {} if stop is None else {"stop": stop}
    asked = tinker.ok("asample", sampling_session_id=sampler, seq_id=0, prompt=prompt, sampling_params=params)
    event = tinker.api.store.get(int(asked["request_id"]))
    assert event is not None and isinstance(event.event, kinds.SampleRequested)
    assert (event.event.params.stop, event.event.params.stop_tokens) == (texts, tokens)
    assert event.event.params.max_tokens == 31, "as far as the model goes"


def test_a_session_that_ended(tinker: Tinker) -> None:
    model = tinker.model()
    session = model.partition(":")[0]
    assert tinker.ok("session_heartbeat", session_id=session) == {"type": "session_heartbeat"}
    path = tinker.saved(model, 1)
    for _ in range(2):
        assert tinker.post(f"sessions/{session}/finish", reason={"type": "success"}).status_code == 204
    assert tinker.post("session_heartbeat", session_id=session).status_code == 410
    (removal,) = tinker.api.store.read(limit=100, adapter=model, types=["remove_lora.requested"])
    answer(tinker.api.store, removal.position)
    assert tinker.forward_backward(model, 2).status_code == 404
    found = tinker.post("create_model", session_id=session, model_seq_id=1, base_model="tiny", lora_config=LORA)
    assert found.status_code == 400 and "ended" in found.json()["detail"]
    other = tinker.session()
    made = tinker.ok("load_weights", session_id=other, model_seq_id=0, path=path, optimizer=True)
    assert made["model_id"] == f"{other}:train:0"


def test_the_line_is_full(settings: Settings, store: EventStore) -> None:
    record_environment(store)
    limits = msgspec.structs.replace(settings.limits, max_pending_requests=2)
    with ApiDriver(msgspec.structs.replace(settings, auth="keys", limits=limits), store) as api:
        tinker = Tinker(api)
        model = tinker.model()
        for seq in (1, 2):
            assert tinker.forward_backward(model, seq).status_code == 200
        found = tinker.forward_backward(model, 3)
        assert found.status_code == 429 and int(found.headers["Retry-After"]) >= 1 and found.json()["detail"]
