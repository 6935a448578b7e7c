"""Rules of the tinker protocol that are easily got wrong: retries, order, errors, owners."""

import struct
from typing import Any

import msgspec
import pytest

from tests.support.api_driver import ApiDriver, answer, record_environment
from tests.support.tinker_driver import LORA, OWNER, STRANGER, Tinker
from tinkerbell.api.tinker import wire_pb2 as pb
from tinkerbell.api.tinker.routes import futures
from tinkerbell.config import Settings
from tinkerbell.events import kinds
from tinkerbell.events.store import EventStore

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
        ("POST", "join_sampling_session", {"sampling_session_id": sampler}),
        ("POST", "retrieve_future", {"request_id": request_id}),
        ("POST", "retrieve_futures", {"target": {"type": "sampling_session", "sampling_session_id": sampler}}),
        ("POST", "cancel_future", {"request_id": request_id}),
        ("POST", "weights_info", {"tinker_path": path}),
        ("POST", "copy_weights", {"source_path": path, "destination_project_id": "default"}),
        (
            "POST",
            "copy_weights",
            {"source_path": path, "session_id": stranger.session(), "model_seq_id": 0},
        ),
        ("POST", "copy_weights", {"source_path": path, "session_id": session, "model_seq_id": 9}),
        ("GET", run, {}),
        ("GET", f"{run}/checkpoints", {}),
        ("DELETE", f"{run}/checkpoints/weights/step-1", {}),
        ("POST", f"{run}/checkpoints/weights/step-1/publish", {}),
        ("DELETE", f"{run}/checkpoints/weights/step-1/publish", {}),
        ("PUT", f"{run}/checkpoints/weights/step-1/ttl", {"ttl_seconds": 5}),
        ("GET", f"{run}/checkpoints/external_weights/ext/external_weights_urls", {}),
        ("GET", f"sessions/{session}", {}),
        ("PUT", f"sessions/{session}/project", {"project_id": "default"}),
        ("GET", f"sessions/{session}/trace_export", {}),
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
    for sent in ({}, {"session_id": session}, {"owner": {"type": "user", "owner_urns": [OWNER]}}):
        assert session not in stranger.post("sessions/search", **sent).text
    assert session in tinker.post("sessions/search").text
    routes = {
        (method, route.path)
        for route in tinker.api.app.routes
        if route.path.startswith("/api/v1/")
        for method in getattr(route, "methods", ())
    }
    general = {"client/config", "client/dynamic_config", "healthz", "get_server_capabilities", "create_session"}
    # What test_tinker_accounts asks as a stranger.
    general |= {"billing/usage/events", "billing/usage/checkpoints/current", "audit", "auth/apikey/me"}
    general |= {
        "telemetry",
        "create_custom_loss",
        "training_runs",
        "checkpoints",
        "sessions",
        "sessions/search",
        "downloads",
    }
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
@pytest.mark.parametrize("route", ["retrieve_future", "cancel_future"])
def test_what_is_no_request(tinker: Tinker, route: str, request_id: str) -> None:
    found = tinker.post(route, request_id=request_id)
    assert found.status_code == 404 and found.json()["detail"]


def test_a_sample_is_cancelled_once_by_its_owner_while_it_waits(tinker: Tinker) -> None:
    assert tinker.ok("client/dynamic_config", sdk_version="0.38.0") == {"sample_cancel_enabled": True}
    store, stranger = tinker.api.store, Tinker(tinker.api, STRANGER)
    session, _ = tinker.session(), stranger.session()
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    sampler = tinker.ok("create_sampling_session", **body)["sampling_session_id"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1]}]}
    asked = {"sampling_session_id": sampler, "prompt": prompt, "sampling_params": {"max_tokens": 1}}
    waits, answered = (tinker.ok("asample", **asked, seq_id=seq)["request_id"] for seq in range(2))
    answer(store, int(answered))
    head = store.head()
    for whose, request_id, status in ((stranger, waits, 404), (stranger, answered, 404), (tinker, answered, 204)):
        assert whose.post("cancel_future", request_id=request_id).status_code == status
    assert store.head() == head, "nothing was written"
    for _ in range(2):
        found = tinker.post("cancel_future", request_id=waits)
        assert found.status_code == 204 and not found.content
    (cancelled,) = store.read(head, limit=10)
    assert cancelled.event == kinds.SampleCancelled(request=int(waits))
    assert (cancelled.tenant, cancelled.stream, cancelled.adapter) == (OWNER, f"tenant/{OWNER}", None)
    failure = kinds.SampleFailed(category="user", code="cancelled", message="The caller cancelled this sample.")
    answer(store, int(waits), failure)
    assert tinker.ok("retrieve_future", request_id=waits) == {"error": failure.message, "category": "user"}
    assert tinker.post("cancel_future", request_id=waits).status_code == 204
    store.check()


def test_only_samples_are_cancelled(tinker: Tinker) -> None:
    request_id = tinker.forward_backward(tinker.model(), 1).json()["request_id"]
    head = tinker.api.store.head()
    found = tinker.post("cancel_future", request_id=request_id)
    assert found.status_code == 400 and "forward_backward; only samples" in found.json()["detail"]
    assert tinker.api.store.head() == head


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
