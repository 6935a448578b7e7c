"""One long poll for all samples of a client, and clients that share a sampler."""

import threading
import time
from typing import Any

import pytest

from tests.support.api_driver import answer, problem
from tests.support.tinker_driver import OWNER, Tinker
from tests.support.waiting import AT_ONCE_S
from tinkerbell.api.tinker.messages import CLONE_SEQS
from tinkerbell.api.tinker.routes import futures
from tinkerbell.events import kinds

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}


def sampler_of(tinker: Tinker, session: str | None = None, number: int = 0) -> str:
    body = {"session_id": session or tinker.session(), "sampling_session_seq_id": number, "base_model": "tiny"}
    sampler: str = tinker.ok("create_sampling_session", **body)["sampling_session_id"]
    return sampler


def sample(tinker: Tinker, sampler: str, seq: int) -> str:
    body = {"sampling_session_id": sampler, "seq_id": seq, "prompt": PROMPT, "sampling_params": {"max_tokens": 2}}
    request_id: str = tinker.ok("asample", **body)["request_id"]
    return request_id


def poll(tinker: Tinker, sampler: str, cursor: int = 0, clone: int = 0, **more: Any) -> dict[str, Any]:
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": clone}
    return tinker.ok("retrieve_futures", target=target, prev_cursor=cursor, **more)


def ids(found: dict[str, Any]) -> list[str]:
    return [each["request_id"] for each in found["completions"]]


def test_answers_are_told_once_in_their_order(tinker: Tinker) -> None:
    session = tinker.session()
    sampler, other = sampler_of(tinker, session), sampler_of(tinker, session, 1)
    first, second, third = (sample(tinker, sampler, seq) for seq in range(3))
    elsewhere = sample(tinker, other, 0)
    assert poll(tinker, sampler, timeout=0)["completions"] == []
    answer(tinker.api.store, int(elsewhere))
    for request_id in (second, first):
        answer(tinker.api.store, int(request_id))
    found = poll(tinker, sampler)
    assert ids(found) == [second, first]
    assert {each["state"] for each in found["completions"]} == {"finished"}
    assert all(each["response_payload_uncompressed_size"] > 0 for each in found["completions"])
    again = poll(tinker, sampler, found["cursor"], timeout=0, retrieved_request_ids=[first])
    assert again["completions"] == [] and again["cursor"] >= found["cursor"]
    failure = kinds.SampleFailed(category="user", code="invalid-request", message="no")
    answer(tinker.api.store, int(third), failure)
    found = poll(tinker, sampler, again["cursor"])
    assert found["completions"] == [{"state": "failed", "request_id": third}]
    # From the start all of them, and all can still be fetched.
    assert ids(poll(tinker, sampler)) == [second, first, third]
    assert tinker.post("retrieve_future", request_id=first).status_code == 200
    assert ids(poll(tinker, other)) == [elsewhere]


def test_a_client_hears_of_its_own_samples(tinker: Tinker) -> None:
    sampler = sampler_of(tinker)
    clone, another = (tinker.ok("join_sampling_session", sampling_session_id=sampler)["client_counter"] for _ in "ab")
    assert 1 <= clone < another
    mine, theirs = sample(tinker, sampler, clone * CLONE_SEQS), sample(tinker, sampler, 0)
    for request_id in (mine, theirs):
        answer(tinker.api.store, int(request_id))
    assert ids(poll(tinker, sampler, clone=clone)) == [mine]
    assert ids(poll(tinker, sampler)) == [theirs]
    assert ids(poll(tinker, sampler, clone=another, timeout=0)) == []


def test_who_polls_is_woken_by_the_answer(tinker: Tinker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "HOLD_S", 2 * AT_ONCE_S)
    sampler = sampler_of(tinker)
    request_id = sample(tinker, sampler, 0)
    later = threading.Timer(0.5, answer, (tinker.api.store, int(request_id)))
    later.start()
    began = time.monotonic()
    assert ids(poll(tinker, sampler)) == [request_id]
    assert 0.3 < time.monotonic() - began < AT_ONCE_S
    later.join()


def test_with_no_answer_the_list_is_empty_after_a_hold(tinker: Tinker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "HOLD_S", 0.2)
    sampler = sampler_of(tinker)
    sample(tinker, sampler, 0)
    began = time.monotonic()
    for more in ({}, {"timeout": 100.0}):
        assert poll(tinker, sampler, **more)["completions"] == []
    assert 0.4 <= time.monotonic() - began < AT_ONCE_S


def test_many_answers_come_in_pages(tinker: Tinker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "PAGE", 2)
    sampler = sampler_of(tinker)
    asked = [sample(tinker, sampler, seq) for seq in range(5)]
    for request_id in asked:
        answer(tinker.api.store, int(request_id))
    found: list[str] = []
    cursor = 0
    while more := poll(tinker, sampler, cursor, timeout=0):
        if not more["completions"]:
            break
        cursor = more["cursor"]
        found += ids(more)
    assert found == asked
    # Whole pages of another client's are passed over.
    assert ids(poll(tinker, sampler, clone=7, timeout=0)) == []


@pytest.mark.parametrize(
    "changes", [{"prev_cursor": -1}, {"timeout": -1}, {"target": {"sampling_session_id": "x", "cloned_sampler_id": -1}}]
)
def test_bad_polls_are_refused(tinker: Tinker, changes: dict[str, Any]) -> None:
    target = {"type": "sampling_session", "sampling_session_id": sampler_of(tinker)}
    found = tinker.post("retrieve_futures", **({"target": target} | changes))
    assert 400 <= found.status_code < 500 and found.json()["detail"]


@pytest.mark.parametrize("route", ["optim_step", "save_weights", "save_weights_for_sampler", "load_weights"])
def test_nothing_changes_what_a_sampler_reads(tinker: Tinker, route: str) -> None:
    path = tinker.saved(tinker.model(), 1, "mine", route="save_weights_for_sampler")
    made = {"session_id": tinker.session(), "sampling_session_seq_id": 0, "model_path": path}
    sampler = tinker.ok("create_sampling_session", **made)["sampling_session_id"]
    asked = sample(tinker, sampler, 0)
    for row in tinker.api.store.queries.pending():
        answer(tinker.api.store, row.id)
    refused = [
        tinker.post(route, model_id=sampler, seq_id=1, path="mine" if "load" not in route else path, adam_params={}),
        tinker.forward_backward(sampler, 1),
        tinker.api.post(f"/v1/adapters/{sampler}/optim_step", OWNER),
        tinker.api.post(f"/v1/adapters/{sampler}/checkpoints", OWNER),
    ]
    assert [each.status_code for each in refused] == [400] * len(refused), [each.text for each in refused]
    assert all("which nothing changes" in each.text for each in refused)
    assert ids(poll(tinker, sampler)) == [asked]
    again = sample(tinker, sampler, 1)
    answer(tinker.api.store, int(again))
    assert ids(poll(tinker, sampler)) == [asked, again]


def test_keys_of_the_native_api_cannot_be_those_of_samples(tinker: Tinker) -> None:
    sampler = sampler_of(tinker)
    body = {"prompt": [1, 2], "params": {"max_tokens": 2}}
    headers = {"Idempotency-Key": f"tinker:{sampler}:abc"}
    problem(tinker.api.post("/v1/sample", OWNER, body, headers=headers), 400, "invalid-request")
    assert poll(tinker, sampler, timeout=0)["completions"] == []
