"""What each route does, from the HTTP request to the event and back."""

import asyncio
import base64
import io
import tarfile
from collections.abc import Iterator

import numpy as np
import pytest

from tests.support.api_driver import LOGPROB, MODEL, ApiDriver, answer, datum, problem, record_environment
from tinkerbell.config import Settings
from tinkerbell.events import kinds
from tinkerbell.events.kinds import NewEvent
from tinkerbell.events.store import EventStore
from tinkerbell.types import AdamParams, LoraConfig, OutputSpec

FLOAT32 = float(np.float32(LOGPROB))


@pytest.fixture
def api(settings: Settings, store: EventStore) -> Iterator[ApiDriver]:
    record_environment(store)
    with ApiDriver(settings, store) as driver:
        yield driver


def test_add_lora_is_an_event_before_it_is_answered(api: ApiDriver) -> None:
    body = {"name": "mine", "lora": {"rank": 4, "alpha": 8, "targets": ["attention"]}, "seed": 7}
    future = api.submit("/v1/adapters", json=body, headers={"X-Request-ID": "trace-1"})
    assert future["state"] == "pending"
    assert (future["kind"], future["seq"], future["place"]) == ("add_lora", 0, 0)
    recorded = api.store.get(future["id"])
    assert recorded is not None
    assert recorded.event == kinds.AddLoraRequested(
        base_model="tiny", lora=LoraConfig(rank=4, alpha=8.0, targets=("attention",)), seed=7, name="mine"
    )
    assert (recorded.tenant, recorded.adapter) == ("local", future["adapter_id"])
    assert recorded.stream == f"adapter/{future['adapter_id']}"
    assert (recorded.correlation, recorded.actor) == ("trace-1", None)


def test_a_seed_is_drawn_and_recorded(api: ApiDriver) -> None:
    drawn = {api.get(f"/v1/adapters/{api.adapter()}").json()["seed"] for _ in range(3)}
    assert len(drawn) == 3


def test_the_life_of_an_adapter(api: ApiDriver) -> None:
    adapter = api.adapter(name="run-1")
    shown = api.get(f"/v1/adapters/{adapter}").json()
    assert (shown["state"], shown["name"], shown["step"], shown["next_seq"]) == ("ready", "run-1", 0, 1)
    assert [row["id"] for row in api.get("/v1/adapters").json()] == [adapter]
    removed = api.call("DELETE", f"/v1/adapters/{adapter}")
    assert removed.status_code == 202
    answer(api.store, removed.json()["id"])
    assert api.get(f"/v1/futures/{removed.json()['id']}").json()["result"] == {"type": "remove_lora"}
    assert api.get(f"/v1/adapters/{adapter}").json()["state"] == "removed"
    refused = api.post(f"/v1/adapters/{adapter}/optim_step")
    unknown = api.post(f"/v1/adapters/ad_{'a' * 20}/optim_step")
    assert problem(refused, 404, "not-found")["detail"].replace(adapter, "X") == problem(unknown, 404, "not-found")[
        "detail"
    ].replace(f"ad_{'a' * 20}", "X")


def test_a_forward_carries_the_outputs_it_asks_for(api: ApiDriver) -> None:
    adapter = api.adapter()
    asked = {"entropy": True, "top_k": 2, "logits": True}
    future = api.submit(f"/v1/adapters/{adapter}/forward", json={"data": [datum(3), datum(1)], "outputs": asked})
    recorded = api.store.get(future["id"])
    assert recorded is not None and isinstance(recorded.event, kinds.ForwardRequested)
    assert recorded.event.outputs == OutputSpec(entropy=True, top_k=2, logits=True)
    answer(api.store, future["id"])
    first, second = api.get(f"/v1/futures/{future['id']}").json()["result"]["outputs"]
    assert (first["entropy"], second["entropy"]) == ([FLOAT32] * 3, [FLOAT32])
    assert first["logsumexp"] is None
    assert (first["top_tokens"], second["top_logprobs"]) == ([[0, 1]] * 3, [[FLOAT32] * 2])
    assert first["logits"]["shape"] == [3, MODEL.vocab_size]
    assert base64.b64decode(first["logits"]["data"]) == bytes(12 * MODEL.vocab_size)


def test_a_forward_without_outputs_has_none(api: ApiDriver) -> None:
    future = api.submit(f"/v1/adapters/{api.adapter()}/forward", json={"data": [datum(3)]})
    recorded = api.store.get(future["id"])
    assert recorded is not None and isinstance(recorded.event, kinds.ForwardRequested)
    assert recorded.event.outputs is None
    answer(api.store, future["id"])
    assert api.get(f"/v1/futures/{future['id']}").json()["result"]["outputs"] is None


@pytest.mark.parametrize("route", ["forward", "fwdbwd"])
def test_training_requests_carry_their_data_and_logprobs(api: ApiDriver, route: str) -> None:
    adapter = api.adapter()
    body = {"data": [datum(3, weights=[1, 0.5, 0]), datum(2)], "loss": {"name": "cross_entropy"}}
    future = api.submit(f"/v1/adapters/{adapter}/{route}", json=body)
    recorded = api.store.get(future["id"])
    assert recorded is not None
    assert recorded.event.num_tokens == 5  # type: ignore[union-attr]
    stored = api.store.body(recorded)
    assert isinstance(stored, kinds.ForwardBackwardBody)
    assert np.frombuffer(stored.data[0].loss_inputs["weights"], "<f4").tolist() == [1, 0.5, 0]
    answer(api.store, future["id"])
    done = api.get(f"/v1/futures/{future['id']}").json()
    assert done["state"] == "completed"
    assert done["cost_us"] == 7
    result = done["result"]
    assert (result["type"], result["loss"], result["metrics"]) == ("forward_backward", 1.5, {"m": 2.0})
    assert result["logprobs"] == [[FLOAT32] * 3, [FLOAT32] * 2]


def test_an_optimizer_step(api: ApiDriver) -> None:
    adapter = api.adapter()
    future = api.submit(f"/v1/adapters/{adapter}/optim_step", json={"adam": {"learning_rate": 0.5}})
    recorded = api.store.get(future["id"])
    assert recorded is not None
    assert recorded.event == kinds.OptimStepRequested(adam=AdamParams(learning_rate=0.5))
    answer(api.store, future["id"])
    result = api.get(f"/v1/futures/{future['id']}").json()["result"]
    assert (result["type"], result["step"], result["grad_norm"]) == ("optim_step", 1, 0.5)


def test_samples_of_adapter_and_base_model(api: ApiDriver) -> None:
    adapter = api.adapter()
    body = {"prompt": [1, 2, 3], "params": {"max_tokens": 4, "prompt_logprobs": True}}
    done = api.complete(f"/v1/adapters/{adapter}/sample", json=body)
    assert done["seq"] is None
    assert done["result"]["prompt_logprobs"] == [FLOAT32] * 2
    (sequence,) = done["result"]["sequences"]
    assert sequence == {
        "tokens": [0, 1, 2, 3], "logprobs": [FLOAT32] * 4, "stop_reason": "length",
        "top_tokens": None, "top_logprobs": None,
    }  # fmt: skip
    for name in ("prompt_top_tokens", "prompt_top_logprobs", "prompt_target_logprobs", "prompt_drawn_tokens"):
        assert done["result"][name] is None
    base = api.complete("/v1/sample", json={"prompt": [1], "params": {"max_tokens": 4}})
    assert (base["adapter_id"], base["result"]["prompt_logprobs"]) == (None, None)


def test_a_sample_carries_the_distributions_it_asks_for(api: ApiDriver) -> None:
    params = {"max_tokens": 4, "top_logprobs": 2, "prompt_top_logprobs": 1, "prompt_draws": 2}
    body = {"prompt": [1, 2, 3], "params": params, "prompt_targets": [[5, 6], [7, -1], [-1, 99]]}
    future = api.submit(f"/v1/adapters/{api.adapter()}/sample", json=body)
    recorded = api.store.get(future["id"])
    assert recorded is not None
    stored = api.store.body(recorded)
    assert isinstance(stored, kinds.SampleBody) and stored.prompt_targets is not None
    assert np.frombuffer(stored.prompt_targets, "<i4").tolist() == [5, 6, 7, -1, -1, 99]
    answer(api.store, future["id"])
    result = api.get(f"/v1/futures/{future['id']}").json()["result"]
    (sequence,) = result["sequences"]
    assert (sequence["top_tokens"], sequence["top_logprobs"]) == ([[0, 1]] * 4, [[FLOAT32] * 2] * 4)
    assert (result["prompt_top_tokens"], result["prompt_top_logprobs"]) == ([[0]] * 2, [[FLOAT32]] * 2)
    drawn = (result["prompt_drawn_tokens"], result["prompt_drawn_logprobs"])
    assert drawn == ([[0, 1]] * 2, [[FLOAT32] * 2] * 2)
    assert result["prompt_target_logprobs"] == [[None, None], [FLOAT32, None], [None, FLOAT32]]
    assert result["prompt_logprobs"] is None


def test_sequence_numbers_are_checked_when_given(api: ApiDriver) -> None:
    adapter = api.adapter()
    assert api.submit(f"/v1/adapters/{adapter}/optim_step", json={"seq": 1})["seq"] == 1
    refused = problem(api.post(f"/v1/adapters/{adapter}/optim_step", json={"seq": 1}), 409, "sequence-conflict")
    assert refused["next_seq"] == 2


def test_the_same_key_and_request_give_the_same_future(api: ApiDriver) -> None:
    headers = {"Idempotency-Key": "once"}
    first = api.submit("/v1/adapters", json={"name": "a", "seed": 1}, headers=headers)
    again = api.submit("/v1/adapters", json={"seed": 1, "name": "a"}, headers=headers)
    assert (again["id"], again["adapter_id"]) == (first["id"], first["adapter_id"])
    answer(api.store, first["id"])
    other = api.post("/v1/adapters", json={"name": "b", "seed": 1}, headers=headers)
    problem(other, 409, "idempotency-conflict")
    # One word for both ways to ask.
    adapter, body = first["adapter_id"], {"data": [datum()]}
    path = api.submit(f"/v1/adapters/{adapter}/fwdbwd", json=body, headers={"Idempotency-Key": "two"})
    alias = api.submit("/fwdbwd", json={**body, "adapter_id": adapter}, headers={"Idempotency-Key": "two"})
    assert path["id"] == alias["id"]
    forward = api.post(f"/v1/adapters/{adapter}/forward", json=body, headers={"Idempotency-Key": "two"})
    problem(forward, 409, "idempotency-conflict")


def test_a_key_gives_its_future_also_where_a_new_request_would_be_refused(
    settings: Settings, store: EventStore
) -> None:
    record_environment(store)
    limits = kinds.TenantConfigured(max_adapters=1, max_pending_requests=2)
    store.append(NewEvent(event=limits, tenant="local", stream="tenant/local"))
    with ApiDriver(settings, store) as api:
        first = api.submit("/v1/adapters", json={"seed": 1}, headers={"Idempotency-Key": "a"})
        assert api.submit("/v1/adapters", json={"seed": 1}, headers={"Idempotency-Key": "a"})["id"] == first["id"]
        problem(
            api.post("/v1/adapters", json={"seed": 2}, headers={"Idempotency-Key": "a"}), 409, "idempotency-conflict"
        )
        path = f"/v1/adapters/{first['adapter_id']}/optim_step"
        second = api.submit(path, json={}, headers={"Idempotency-Key": "b"})
        problem(api.post(path, json={}), 429, "too-many-requests")
        assert api.submit(path, json={}, headers={"Idempotency-Key": "b"})["id"] == second["id"]


def test_as_many_adapters_as_allowed_however_many_are_asked_for_at_once(settings: Settings, store: EventStore) -> None:
    record_environment(store)
    limits = kinds.TenantConfigured(max_adapters=3)
    store.append(NewEvent(event=limits, tenant="local", stream="tenant/local"))
    with ApiDriver(settings, store) as api:

        async def flood() -> list[int]:
            calls = (api.acall("POST", "/v1/adapters", json={"seed": n}) for n in range(24))
            return [response.status_code for response in await asyncio.gather(*calls)]

        codes = api.run(flood())
        assert (codes.count(202), codes.count(413)) == (3, 21)


@pytest.mark.parametrize("body", [b"xyz", b"[" * 1000, b"\xff"])
def test_a_body_where_none_belongs_is_refused_with_its_key(api: ApiDriver, body: bytes) -> None:
    adapter = api.adapter()
    headers = {"Idempotency-Key": "d"}
    problem(api.call("DELETE", f"/v1/adapters/{adapter}", content=body, headers=headers), 400, "invalid-request")


@pytest.mark.parametrize("key", ["", "x" * 201, "ä"])
def test_idempotency_keys_are_short_and_printable(api: ApiDriver, key: str) -> None:
    answered = api.post("/v1/adapters", headers={"Idempotency-Key": key.encode("latin-1")})
    assert "idempotency" in problem(answered, 400, "invalid-request")["detail"]


def test_checkpoints(api: ApiDriver) -> None:
    adapter = api.adapter(lora={"rank": 2})
    saved = api.complete(f"/v1/adapters/{adapter}/checkpoints", json={"name": "best"})["result"]
    checkpoint = saved["checkpoint_id"]
    assert (saved["type"], saved["name"], saved["num_bytes"]) == ("save", "best", 1502)
    shown = api.get(f"/v1/checkpoints/{checkpoint}").json()
    assert (shown["adapter_id"], shown["name"], shown["lora"]["rank"]) == (adapter, "best", 2)
    assert api.get("/v1/checkpoints").json() == [shown]
    assert api.get(f"/v1/adapters/{adapter}/checkpoints").json() == [shown]
    assert api.get("/v1/checkpoints?offset=1").json() == []
    done = api.complete(f"/v1/adapters/{adapter}/load", json={"checkpoint": checkpoint, "with_optimizer": False})
    assert done["result"]["checkpoint_id"] == checkpoint
    child = api.submit("/v1/adapters", json={"checkpoint": checkpoint})
    recorded = api.store.get(child["id"])
    assert recorded is not None
    assert isinstance(recorded.event, kinds.AddLoraRequested)
    assert (recorded.event.checkpoint, recorded.event.lora.rank, recorded.event.with_optimizer) == (
        checkpoint,
        2,
        True,
    )
    assert api.get(f"/v1/adapters/{child['adapter_id']}").json()["parent_checkpoint"] == checkpoint


@pytest.mark.parametrize("optimizer", [False, True])
def test_a_download_is_a_peft_directory(api: ApiDriver, optimizer: bool) -> None:
    adapter = api.adapter()
    checkpoint = api.complete(f"/v1/adapters/{adapter}/checkpoints")["result"]["checkpoint_id"]
    answered = api.get(f"/v1/checkpoints/{checkpoint}/download?optimizer={optimizer}")
    assert answered.headers["content-type"] == "application/x-tar"
    assert answered.headers["content-disposition"] == f'attachment; filename="{checkpoint}.tar"'
    with tarfile.open(fileobj=io.BytesIO(answered.content)) as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    expected = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w" * 1000}
    if optimizer:
        expected["optimizer.safetensors"] = b"o" * 500
    assert files == {f"{checkpoint}/{name}": content for name, content in expected.items()}


def test_a_recovery_point_is_the_servers_own(api: ApiDriver) -> None:
    adapter, checkpoint = api.adapter(), f"ck_{'b' * 20}"
    event = kinds.CheckpointWritten(
        checkpoint=checkpoint, after_seq=0, step=0, lora=LoraConfig(), num_bytes=1, state_digest="d"
    )
    api.store.append(
        NewEvent(event=event, tenant="local", stream=f"adapter/{adapter}", adapter=adapter, blobs={"weights": b"w"})
    )
    problem(api.get(f"/v1/checkpoints/{checkpoint}"), 404, "not-found")
    problem(api.post(f"/v1/adapters/{adapter}/load", json={"checkpoint": checkpoint}), 404, "not-found")
    assert api.get("/v1/checkpoints").json() == []


def test_a_checkpoint_of_another_shape_cannot_take_the_place(api: ApiDriver) -> None:
    small, large = api.adapter(lora={"rank": 2}), api.adapter(lora={"rank": 4})
    checkpoint = api.complete(f"/v1/adapters/{small}/checkpoints")["result"]["checkpoint_id"]
    refused = api.post(f"/v1/adapters/{large}/load", json={"checkpoint": checkpoint})
    assert (
        "has rank 2, alpha 32 and targets all-linear, the adapter rank 4"
        in problem(refused, 400, "invalid-request")["detail"]
    )


def test_a_failed_request_says_why(api: ApiDriver) -> None:
    adapter = api.adapter()
    future = api.submit(f"/v1/adapters/{adapter}/optim_step")
    failed = kinds.OptimStepFailed(category="user", code="no-gradients", message="nothing was accumulated")
    answer(api.store, future["id"], failed)
    done = api.get(f"/v1/futures/{future['id']}").json()
    assert done["state"] == "failed"
    assert done["error"] == {"category": "user", "code": "no-gradients", "message": "nothing was accumulated"}
    assert done["finished_at"] >= done["created_at"]


def test_a_long_poll_ends_with_the_answer(api: ApiDriver) -> None:
    future = api.submit("/v1/adapters")

    async def poll_while_answering() -> tuple[float, dict[str, object]]:
        loop = asyncio.get_running_loop()
        poll = asyncio.create_task(api.acall("GET", f"/v1/futures/{future['id']}?wait_s=30"))
        await asyncio.sleep(0.2)
        assert not poll.done()
        answered_at = loop.time()
        await asyncio.to_thread(answer, api.store, future["id"])
        response = await poll
        return loop.time() - answered_at, response.json()

    took_s, done = api.run(poll_while_answering())
    assert done["state"] == "completed"
    assert took_s < 2.0


def test_a_long_poll_ends_at_its_deadline(api: ApiDriver) -> None:
    future = api.submit("/v1/adapters")
    assert api.get(f"/v1/futures/{future['id']}?wait_s=0.1").json()["state"] == "pending"


def test_pending_futures_in_pages(api: ApiDriver) -> None:
    ids = [api.submit("/v1/sample", json={"prompt": [1], "params": {"max_tokens": 1}})["id"] for _ in range(5)]
    answer(api.store, ids.pop(1))
    first = api.get("/v1/futures?limit=3").json()
    rest = api.get(f"/v1/futures?limit=3&after={first[-1]['id']}").json()
    assert [future["id"] for future in first + rest] == ids
    assert [future["place"] for future in first + rest] == [0, 1, 2, 3]
    assert api.get(f"/v1/futures/{ids[2]}").json()["place"] == 2


def test_runs_usage_and_queue(api: ApiDriver) -> None:
    adapter = api.adapter()
    api.complete(f"/v1/adapters/{adapter}/fwdbwd", json={"data": [datum(3)]})
    api.complete(f"/v1/adapters/{adapter}/optim_step", json={"adam": {"learning_rate": 0.25}})
    waiting = api.submit("/v1/sample", json={"prompt": [1, 2], "params": {"max_tokens": 1}})
    run = api.get(f"/v1/runs/{adapter}").json()
    assert (run["adapter"]["id"], run["num_requests"], run["num_failed"], run["cost_us"]) == (
        adapter,
        3,
        0,
        10,
    )
    (point,) = run["points"]
    assert (point["step"], point["learning_rate"], point["grad_norm"]) == (1, 0.25, 0.5)
    assert (point["loss_per_token"], point["num_tokens"]) == (0.5, 3)
    assert api.get(f"/v1/runs/{adapter}?after_step=1").json()["points"] == []
    assert [listed["adapter"]["id"] for listed in api.get("/v1/runs").json()] == [adapter]
    usage = {row["kind"]: row for row in api.get("/v1/usage").json()}
    assert (usage["forward_backward"]["cost_us"], usage["forward_backward"]["tokens_in"]) == (7, 3)
    queue = api.get("/v1/queue").json()
    (line,) = queue["tenants"]
    assert (line["tenant"], line["num_pending"], line["pending_tokens"]) == ("local", 1, 3)
    assert (line["cost_us"], line["recent_cost_us"]) == (10, 10)
    assert queue["position"] == waiting["id"]


def test_the_model(api: ApiDriver) -> None:
    (model,) = api.get("/v1/models").json()
    assert (model["name"], model["vocab_size"], model["max_length"]) == (
        MODEL.name,
        MODEL.vocab_size,
        MODEL.max_length,
    )


def test_the_short_paths(api: ApiDriver) -> None:
    adapter = api.complete("/add_lora")["adapter_id"]
    api.complete("/fwdbwd", json={"adapter_id": adapter, "data": [datum()]})
    api.complete("/optim_step", json={"adapter_id": adapter})
    future = api.submit("/sample", json={"adapter_id": adapter, "prompt": [1], "params": {"max_tokens": 1}})
    assert future["adapter_id"] == adapter
    pending = api.post("/retrieve_future", json={"future_id": future["id"]})
    assert (pending.status_code, pending.json()["state"]) == (200, "pending")
    answer(api.store, future["id"])
    done = api.post("/retrieve_future", json={"future_id": future["id"], "wait_s": 1}).json()
    assert done["result"]["type"] == "sample"
    base = api.submit("/sample", json={"prompt": [1], "params": {"max_tokens": 1}})
    assert base["adapter_id"] is None
    problem(api.post("/retrieve_future", json={"future_id": 10**30}), 404, "not-found")


def test_concurrent_posts_do_not_share_the_last_place(settings: Settings, store: EventStore) -> None:
    record_environment(store)
    store.append(NewEvent(event=kinds.TenantConfigured(max_pending_requests=3), tenant="local", stream="tenant/local"))
    body = {"prompt": [1], "params": {"max_tokens": 1}}
    with ApiDriver(settings, store) as api:

        async def flood() -> list[int]:
            calls = (api.acall("POST", "/v1/sample", json=body) for _ in range(10))
            return [response.status_code for response in await asyncio.gather(*calls)]

        codes = api.run(flood())
        # A request that is just being committed counts twice for a moment: too few may enter, never too many.
        assert 1 <= codes.count(202) <= 3
        assert codes.count(202) + codes.count(429) == 10
        for _ in range(3 - codes.count(202)):
            api.submit("/v1/sample", json=body)
        refused = api.post("/v1/sample", json=body)
        assert refused.headers["retry-after"] == "10"
        assert problem(refused, 429, "too-many-requests")["place"] == 3
        answer(store, api.get("/v1/futures").json()[0]["id"])
        assert api.post("/v1/sample", json=body).status_code == 202


def test_limits_of_adapters_and_tokens(settings: Settings, store: EventStore) -> None:
    record_environment(store)
    event = kinds.TenantConfigured(max_adapters=1, max_pending_tokens=5)
    store.append(NewEvent(event=event, tenant="local", stream="tenant/local"))
    with ApiDriver(settings, store) as api:
        adapter = api.adapter()
        assert "1 of 1 adapters" in problem(api.post("/v1/adapters"), 413, "quota-exceeded")["detail"]
        api.submit(f"/v1/adapters/{adapter}/forward", json={"data": [datum(3)]})
        problem(api.post(f"/v1/adapters/{adapter}/forward", json={"data": [datum(3)]}), 429, "too-many-requests")
        problem(api.post(f"/v1/adapters/{adapter}/forward", json={"data": [datum(6)]}), 413, "quota-exceeded")
        assert api.call("DELETE", f"/v1/adapters/{adapter}").status_code == 202


def test_the_log_stays_whole(api: ApiDriver) -> None:
    adapter = api.adapter()
    api.complete(f"/v1/adapters/{adapter}/fwdbwd", json={"data": [datum(3)]})
    api.complete(f"/v1/adapters/{adapter}/checkpoints")
    api.submit(f"/v1/adapters/{adapter}/optim_step")
    api.store.check()
