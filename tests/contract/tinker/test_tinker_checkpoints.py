"""How long checkpoints and samplers of the tinker protocol are kept, and what a sample may ask."""

import time
from datetime import datetime
from typing import Any

import httpx
import msgspec
import pytest

from tests.contract.test_event_compaction import compact
from tests.support.api_driver import ApiDriver, answer, record_environment, revoke_key
from tests.support.tinker_driver import LORA, OWNER, Tinker
from tinkerbell.api import auth
from tinkerbell.api.tinker import downloads
from tinkerbell.api.tinker import wire_pb2 as pb
from tinkerbell.config import Settings
from tinkerbell.errors import Compacted
from tinkerbell.events import kinds
from tinkerbell.events.rows import CheckpointRow
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.expendable import expendable


def test_a_name_is_taken_until_it_is_overwritten_or_gone(tinker: Tinker) -> None:
    model = tinker.model()
    tinker.saved(model, 1)
    found = tinker.post("save_weights", model_id=model, seq_id=2, path="step-1")
    assert found.status_code == 400 and "already" in found.json()["detail"]
    tinker.saved(model, 3, overwrite=True)
    route = f"training_runs/{model}/checkpoints/weights/step-1"
    assert tinker.call("DELETE", route).status_code == 204
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


def test_a_download_ends_with_its_time_and_with_its_key(tinker: Tinker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "CACHE_TTL_S", 0.0)
    model = tinker.model()
    tinker.saved(model, 1, "ext", "save_weights_external")
    route = f"training_runs/{model}/checkpoints/external_weights/ext/external_weights_urls"
    answered = tinker.call("GET", route).json()
    lasts_s = datetime.fromisoformat(answered["expires"]).timestamp() - time.time()
    assert lasts_s <= tinker.api.settings.http.download_valid_s
    url = answered["urls"]["adapter_model.safetensors"]
    assert tinker.api.get(url).status_code == 200
    with monkeypatch.context() as later:
        now_s = time.time()
        later.setattr(downloads.time, "time", lambda: now_s + tinker.api.settings.http.download_valid_s + 1)
        assert tinker.api.get(url).status_code == 404
    revoke_key(tinker.api.store, OWNER, tinker.api.key(OWNER))
    assert tinker.api.get(url).status_code == 404


@pytest.mark.parametrize("public_url", ["https://tinkerbell.example", "https://tinkerbell.example/lora/"])
def test_addresses_are_those_that_clients_reach(settings: Settings, sqlite_store: EventStore, public_url: str) -> None:
    record_environment(sqlite_store)
    http = msgspec.structs.replace(settings.http, public_url=public_url)
    with ApiDriver(msgspec.structs.replace(settings, auth="keys", http=http), sqlite_store) as api:
        tinker = Tinker(api)
        model = tinker.model()
        tinker.saved(model, 1, "ext", "save_weights_external")
        route = f"training_runs/{model}/checkpoints/external_weights/ext/external_weights_urls"
        for url in tinker.call("GET", route).json()["urls"].values():
            assert url.startswith(f"{public_url.rstrip('/')}/api/v1/downloads/")


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
        ({"prompt_alt_tokens_k": 65}, "prompt_alt_tokens_k is 65; it may be 0 to 64"),
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
        ({"record_stability_info": True}, "Train with importance_sampling"),
        ({"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}, "'image' is not served"),
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


def test_a_sequence_that_fills_the_context_is_scored(tinker: Tinker) -> None:
    session = tinker.session()
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    sampler = tinker.ok("create_sampling_session", **body)["sampling_session_id"]
    asked = {"sampling_session_id": sampler, "prompt_logprobs": True, "num_samples": 1}
    for seq, (length, params) in enumerate([(32, {"max_tokens": 1}), (32, {}), (31, {"max_tokens": 1})]):
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [1] * length}]}
        tinker.ok("asample", **asked, seq_id=seq, prompt=prompt, sampling_params=params)
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1] * 33}]}
    for params in ({"max_tokens": 1}, {}):
        found = tinker.post("asample", **asked, seq_id=9, prompt=prompt, sampling_params=params)
        assert found.status_code == 400 and "takes at most 32" in found.json()["detail"]


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


# ---- copies ----------------------------------------------------------------------------------------------------------


def asked_copy(tinker: Tinker, path: str, *, key: str | None = None, **more: Any) -> httpx.Response:
    body = {"source_path": path, **({} if "session_id" in more else {"destination_project_id": "default"}), **more}
    headers = {"X-SDK-Version": "0.38.0"} | ({} if key is None else {"X-Idempotency-Key": key})
    return tinker.call("POST", "copy_weights", json=body, headers=headers)


def copied(tinker: Tinker, path: str, **more: Any) -> str:
    """Path of the copy."""
    found = asked_copy(tinker, path, **more)
    assert found.status_code == 200, found.text
    made: str = found.json()["tinker_path"]
    return made


def route_of(path: str) -> str:
    model, kind, name = path.removeprefix("tinker://").split("/")
    return f"training_runs/{model}/checkpoints/{kind}/{name}"


def row_at(tinker: Tinker, path: str) -> CheckpointRow:
    run = path.removeprefix("tinker://").split("/")[0]
    (row,) = tinker.api.store.queries.checkpoints(OWNER, run)
    return row


def compact_all(tinker: Tinker) -> int:
    """Files deleted."""
    store = tinker.api.store
    told = [store.get(position) for position in expendable(store, OWNER, 2**60)]
    return compact(store, [recorded for recorded in told if recorded is not None])[1]


def test_a_copy_outlives_its_source(tinker: Tinker) -> None:
    store, model = tinker.api.store, tinker.model()
    path = tinker.saved(model, 1, user_metadata={"k": "v"}, ttl_seconds=7200)
    copy = copied(tinker, path, key="one")
    run = copy.removeprefix("tinker://").split("/")[0]
    assert copy == f"tinker://{run}/weights/step-1" and run.endswith(":train:0") and run != model
    (listed,) = tinker.call("GET", f"training_runs/{run}/checkpoints").json()["checkpoints"]
    (source,) = tinker.call("GET", f"training_runs/{model}/checkpoints").json()["checkpoints"]
    kept = ("checkpoint_id", "checkpoint_type", "size_bytes", "user_metadata", "public")
    assert {name: listed[name] for name in kept} == {name: source[name] for name in kept}
    assert listed["tinker_path"] == copy and listed["expires_at"] is None and source["expires_at"] is not None
    assert row_at(tinker, copy).blobs == row_at(tinker, path).blobs, "no bytes are written twice"
    shown = tinker.call("GET", f"training_runs/{run}").json()
    assert shown["last_checkpoint"] == listed and not shown["corrupted"]
    session = run.partition(":")[0]
    assert tinker.call("GET", f"sessions/{session}").json()["training_run_ids"] == [run]
    found = tinker.call("GET", "checkpoints").json()["checkpoints"]
    assert [each["tinker_path"] for each in found] == [copy, path]

    assert tinker.call("DELETE", route_of(path)).status_code == 204
    assert tinker.post(f"sessions/{model.partition(':')[0]}/finish", reason={"type": "success"}).status_code == 204
    (removal,) = store.read(limit=100, adapter=model, types=["remove_lora.requested"])
    answer(store, removal.position)
    compact_all(tinker)
    assert store.blob(row_at(tinker, copy).blobs["weights"]) == b"w" * 1000
    assert tinker.ok("weights_info", tinker_path=copy)["lora_rank"] == LORA["rank"]
    assert asked_copy(tinker, path).status_code == 404
    assert asked_copy(tinker, path, key="one").json() == {"tinker_path": copy}, "a retry, whatever became of the source"
    body = {"session_id": tinker.session(), "model_seq_id": 0, "path": copy, "optimizer": True}
    loaded = tinker.ok("load_weights", **body)
    answer(store, int(loaded["request_id"]))
    assert tinker.ok("retrieve_future", request_id=loaded["request_id"])["path"] == copy
    again = copied(tinker, copy)
    for method, route in (("POST", "publish"), ("DELETE", "publish"), ("PUT", "ttl")):
        sent = {"json": {"ttl_seconds": 60}} if route == "ttl" else {}
        assert tinker.call(method, f"{route_of(again)}/{route}", **sent).status_code == 204
    assert row_at(tinker, again).expires_us is not None
    store.check()


def test_the_bytes_go_with_the_last_that_has_them(tinker: Tinker) -> None:
    store = tinker.api.store
    path = tinker.saved(tinker.model(), 1, "sampled", "save_weights_for_sampler")
    copy = copied(tinker, path)
    blobs = row_at(tinker, copy).blobs
    assert tinker.call("DELETE", route_of(copy)).status_code == 204
    assert asked_copy(tinker, copy).status_code == 404
    assert compact_all(tinker) == 0
    store.require_blobs(blobs.values())
    assert tinker.call("DELETE", route_of(path)).status_code == 204
    assert compact_all(tinker) == len(blobs)
    with pytest.raises(Compacted):
        store.require_blobs(blobs.values())
    store.check()


def test_a_retried_copy_is_one(tinker: Tinker) -> None:
    path = tinker.saved(tinker.model(), 1)
    sessions = len(tinker.api.store.queries.sessions(OWNER))
    made = {copied(tinker, path, key="one") for _ in range(3)}
    assert len(made) == 1 and len(tinker.api.store.queries.sessions(OWNER)) == sessions + 1
    assert tinker.api.store.queries.sessions(OWNER)[0].client == "tinker/0.38.0"
    found = asked_copy(tinker, path, key="one", ttl_seconds=3600)
    assert found.status_code == 400 and "another request" in found.json()["detail"]
    assert {copied(tinker, path, key="two"), copied(tinker, path), copied(tinker, path)}.isdisjoint(made)
    tinker.api.store.check()


def test_a_copy_in_a_session_takes_a_number_and_is_not_trained(tinker: Tinker) -> None:
    path = tinker.saved(tinker.model(), 1)
    session = tinker.session()
    for _ in range(2):
        made = copied(tinker, path, key="one", session_id=session, model_seq_id=3)
        assert made == f"tinker://{session}:train:3/weights/step-1"
    for taken in ({"source_path": path}, {"path": path}, {"base_model": "tiny", "lora_config": LORA}):
        name = next(iter(taken))
        route = {"source_path": "copy_weights", "path": "load_weights", "base_model": "create_model"}[name]
        found = tinker.post(route, session_id=session, model_seq_id=3, **taken)
        assert found.status_code == 400 and "already" in found.json()["detail"], route
    run = f"{session}:train:3"
    assert tinker.forward_backward(run, 1).status_code == 404
    assert tinker.post("optim_step", model_id=run, seq_id=1, adam_params={}).status_code == 404
    assert tinker.post("save_weights", model_id=run, seq_id=1, path="x").status_code == 404
    assert tinker.post("load_weights", model_id=run, seq_id=1, path=path).status_code == 404
    assert tinker.ok("get_info", model_id=run)["lora_rank"] == LORA["rank"]
    assert tinker.post(f"sessions/{session}/finish", reason={"type": "success"}).status_code == 204
    found = asked_copy(tinker, path, session_id=session, model_seq_id=4)
    assert found.status_code == 400 and "ended" in found.json()["detail"]
    tinker.api.store.check()


def test_a_copy_is_sampled_from_and_taken_away(tinker: Tinker) -> None:
    model = tinker.model()
    copy = copied(tinker, tinker.saved(model, 1, "one", "save_weights_for_sampler"))
    session = tinker.session()
    body = {"session_id": session, "sampling_session_seq_id": 0, "model_path": copy}
    sampler = tinker.ok("create_sampling_session", **body)["sampling_session_id"]
    assert tinker.call("GET", f"samplers/{sampler}").json()["model_path"] == copy
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    tinker.ok("asample", sampling_session_id=sampler, seq_id=0, prompt=prompt, sampling_params={"max_tokens": 2})
    made = tinker.api.store.read(limit=10, adapter=sampler)[0].event
    assert isinstance(made, kinds.AddLoraRequested) and made.checkpoint == row_at(tinker, copy).id
    taken = copied(tinker, tinker.saved(model, 2, "two", "save_weights_external"))
    url = tinker.call("GET", f"{route_of(taken)}/external_weights_urls").json()["urls"]["adapter_model.safetensors"]
    assert tinker.api.get(url).content == b"w" * 1000


def test_a_checkpoint_without_a_name_is_copied_under_its_id(tinker: Tinker) -> None:
    adapter = tinker.api.adapter(OWNER)
    saved = tinker.api.complete(f"/v1/adapters/{adapter}/checkpoints", OWNER)["result"]["checkpoint_id"]
    copy = copied(tinker, f"tinker://{adapter}/weights/{saved}", ttl_seconds=3600)
    assert copy.endswith(f":train:0/weights/{saved}")
    row = row_at(tinker, copy)
    assert row.id != saved and row.expires_us == row.created_us + 3600 * 1_000_000


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"destination_project_id": "proj-archive"}, "no project 'proj-archive'"),
        ({"destination_project_id": None}, "destination_project_id, or session_id and model_seq_id"),
        ({"model_seq_id": 1}, "destination_project_id, or session_id and model_seq_id"),
        ({"weights_access_token": "secret"}, "leave it out"),
        ({"ttl_seconds": 3599}, "3600"),
        ({"ttl_seconds": 10**9}, "315576000"),
        ({"source_path": "tinker://x/y"}, "no path of a checkpoint"),
    ],
)
def test_bad_copies_are_named(tinker: Tinker, change: dict[str, Any], detail: str) -> None:
    path = tinker.saved(tinker.model(), 1)
    head = tinker.api.store.head()
    found = asked_copy(tinker, **({"path": path} | {"path" if k == "source_path" else k: v for k, v in change.items()}))
    assert found.status_code == 400 and detail in found.json()["detail"], found.text
    body = {"source_path": path, "destination_project_id": OWNER}
    found = tinker.call("POST", "copy_weights", json=body, headers={"X-Tinker-Weights-Access-Token": "secret"})
    assert found.status_code == 400 and "secret" not in found.text
    assert tinker.api.store.head() == head, "nothing was written"
    assert tinker.post("copy_weights", **body).status_code == 200, "a tenant's name is its project"
