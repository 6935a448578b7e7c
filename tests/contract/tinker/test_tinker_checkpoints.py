"""How long checkpoints and samplers of the tinker protocol are kept, and what a sample may ask."""

from typing import Any

import pytest

from tests.support.api_driver import answer
from tests.support.tinker_driver import LORA, OWNER, Tinker
from tinkerbell.api.tinker import wire_pb2 as pb
from tinkerbell.events import kinds


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
