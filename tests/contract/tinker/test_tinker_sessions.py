"""How long sessions live; the search for them."""

import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec
import pytest

from tests.support.api_driver import ApiDriver, answer, record_environment
from tests.support.tinker_driver import LORA, OWNER, STRANGER, Tinker
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.session_expiry import SessionExpiry

EXPIRY_S = 2.0


def made(tinker: Tinker, **more: Any) -> str:
    session: str = tinker.ok("create_session", sdk_version="0.38.0", tags=[], **more)["session_id"]
    return session


def found(tinker: Tinker, **asked: Any) -> list[str]:
    """Ids, by pages of two."""
    ids: list[str] = []
    cursor = None
    while True:
        page = tinker.ok("sessions/search", limit=2, **asked, **({} if cursor is None else {"cursor": cursor}))
        ids += [each["session_id"] for each in page["sessions"]]
        cursor = page["next_cursor"]
        if cursor is None:
            return ids
        assert len(page["sessions"]) == 2


def test_a_session_is_told_of(tinker: Tinker) -> None:
    session = made(tinker, display_name="Mine", user_metadata={"k": "v"})
    model = tinker.model(session)
    for seq, name in enumerate(("one", "two", "gone")):
        tinker.saved(model, seq, name)
    tinker.call("DELETE", f"training_runs/{model}/checkpoints/weights/gone")
    (row,) = tinker.ok("sessions/search")["sessions"]
    assert datetime.fromisoformat(row.pop("created_at")).tzinfo is not None
    sizes = [each.num_bytes for each in tinker.api.store.queries.checkpoints(OWNER) if not each.deleted]
    assert row == {
        "session_id": session,
        "owner": OWNER,
        "project_id": "default",
        "status": {"type": "active"},
        "checkpoints_count": 2,
        "display_name": "Mine",
        "user_metadata": {"k": "v"},
        "checkpoint_storage_bytes": sum(sizes),
    }
    reason = {"type": "errored"}
    assert tinker.post(f"sessions/{session}/finish", reason=reason, detail="no memory").status_code == 204
    (row,) = tinker.ok("sessions/search")["sessions"]
    assert row["status"] == {"type": "client_finished", "reason": reason, "detail": "no memory"}


def test_each_filter_and_all_pages(tinker: Tinker) -> None:
    plain = made(tinker)
    first = made(tinker, display_name="Maths with LoRA", user_metadata={"k": "v", "n": "1"})
    second = made(tinker, display_name="maths", user_metadata={"k": "v"})
    third = made(tinker, display_name="poems")
    assert found(tinker) == [third, second, first, plain]
    assert found(tinker, display_name="MATHS") == [second, first]
    assert found(tinker, display_name="lora  maths") == [first]
    assert found(tinker, session_id=plain) == [plain]
    assert found(tinker, session_id=plain, display_name="poem") == [third, plain]
    assert found(tinker, session_id="se_none") == []
    assert found(tinker, user_metadata={"k": "v"}) == [second, first]
    assert found(tinker, user_metadata={"k": "v", "n": "1"}) == [first]
    assert found(tinker, user_metadata={"k": "v"}, session_id=third) == []
    for session, reason in ((first, "success"), (second, "interrupted")):
        assert tinker.post(f"sessions/{session}/finish", reason={"type": reason}).status_code == 204
    assert found(tinker, statuses=[{"type": "active"}]) == [third, plain]
    assert found(tinker, statuses=[{"type": "client_finished"}]) == [second, first]
    finished = {"type": "client_finished", "reasons": ["success"]}
    assert found(tinker, statuses=[finished]) == [first]
    assert found(tinker, statuses=[{"type": "active"}, finished]) == [third, first, plain]
    assert found(tinker, statuses=[{"type": "failed"}, {"type": "cancelled"}]) == []
    assert len(found(tinker, project_ids=["default", OWNER], owner={"type": "accessible"})) == 4
    assert len(found(tinker, owner={"type": "user", "owner_urns": ["x", OWNER]})) == 4
    assert found(tinker, owner={"type": "user", "owner_urns": ["x"]}) == []
    assert found(Tinker(tinker.api, STRANGER)) == []


@pytest.mark.parametrize(
    ("asked", "detail"),
    [
        ({"project_ids": ["other"]}, "no project 'other'"),
        ({"display_name": " "}, "leave it out"),
        ({"limit": 0}, "1"),
        ({"limit": 201}, "200"),
        ({"statuses": [{"type": "x"}]}, "x"),
        ({"cursor": {"last_created_at": "2026-01-01T00:00:00", "last_session_id": ""}}, "next_cursor back unchanged"),
    ],
)
def test_bad_searches_are_named(tinker: Tinker, asked: dict[str, Any], detail: str) -> None:
    made(tinker)
    answered = tinker.post("sessions/search", **asked)
    assert answered.status_code == 400 and detail in answered.json()["detail"], answered.text


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999-12:00"])
def test_the_ends_of_time(tinker: Tinker, at: str) -> None:
    session = made(tinker)
    page = tinker.ok("sessions/search", cursor={"last_created_at": at, "last_session_id": ""})
    assert [each["session_id"] for each in page["sessions"]] == ([session] if at > "2026" else [])


def test_every_session_lies_in_the_one_project(tinker: Tinker) -> None:
    session = made(tinker)
    for project in ("default", OWNER):
        moved = tinker.call("PUT", f"sessions/{session}/project", json={"project_id": project})
        assert moved.status_code == 204 and not moved.content
    refused = tinker.call("PUT", f"sessions/{session}/project", json={"project_id": "archive"})
    assert refused.status_code == 400 and "There is no project 'archive'" in refused.json()["detail"]


def test_a_trace_is_not_made_and_the_answer_says_what_to_do(tinker: Tinker) -> None:
    answer = tinker.call("GET", f"sessions/{made(tinker)}/trace_export").json()
    assert answer["status"] == "failed" and "/v1/events" in answer["error"]


@pytest.fixture
def hasty(settings: Settings, store: EventStore) -> Iterator[Tinker]:
    """Of a server whose sessions expire soon."""
    record_environment(store)
    with ApiDriver(msgspec.structs.replace(settings, auth="keys", session_expiry_s=EXPIRY_S), store) as api:
        yield Tinker(api)


@pytest.fixture
def expiry(store: EventStore) -> SessionExpiry:
    lease = store.acquire_lease("scheduler", "here", 3600.0)
    assert lease is not None
    return SessionExpiry(store, lease, EXPIRY_S)


def test_silence_ends_a_session_and_keeps_what_it_saved(hasty: Tinker, expiry: SessionExpiry) -> None:
    store = hasty.api.store
    silent, speaks, works, waits, ended = (made(hasty) for _ in range(5))
    models = {session: hasty.model(session) for session in (silent, works, waits)}
    path = hasty.saved(models[silent], 1)
    stepped = hasty.ok("optim_step", model_id=models[waits], seq_id=1, adam_params={"learning_rate": 0.1})
    assert hasty.post(f"sessions/{ended}/finish", reason={"type": "success"}).status_code == 204
    time.sleep(EXPIRY_S)
    hasty.saved(models[works], 1)
    assert hasty.post("session_heartbeat", session_id=speaks).status_code == 200
    num_events = store.head()
    assert hasty.post("session_heartbeat", session_id=speaks).status_code == 200
    assert store.head() == num_events, "what is known already is not written again"

    expiry.do(EXPIRY_S)
    ends = [(each.event.session, each.event.reason) for each in store.read(types=["session.ended"])]
    assert ends == [(ended, "success"), (silent, "expired")]
    (removal,) = store.read(types=["remove_lora.requested"])
    assert removal.adapter == models[silent]
    answer(store, removal.position)
    expiry.do(EXPIRY_S)
    assert len(store.read(types=["session.ended"])) == 2

    assert hasty.post("session_heartbeat", session_id=silent).status_code == 410
    assert hasty.post("session_heartbeat", session_id=speaks).status_code == 200
    status = {each["session_id"]: each["status"] for each in hasty.ok("sessions/search")["sessions"]}
    assert status[silent] == {"type": "cancelled", "detail": "Nothing was heard of it for 2 s."}
    assert status[works] == {"type": "active"}
    refused = hasty.post("create_model", session_id=silent, model_seq_id=1, base_model="tiny", lora_config=LORA)
    assert refused.status_code == 400 and "start another one" in refused.text
    gone = hasty.post("optim_step", model_id=models[silent], seq_id=2, adam_params={})
    assert gone.status_code == 404 and "from a checkpoint in another session" in gone.text
    assert hasty.ok("weights_info", tinker_path=path)["base_model"] == "tiny"
    sampler = hasty.ok("create_sampling_session", session_id=made(hasty), sampling_session_seq_id=0, model_path=path)
    assert sampler["sampling_session_id"]
    answer(store, int(stepped["request_id"]))
    store.check()


def test_a_new_leader_listens_before_it_ends_sessions(hasty: Tinker, store: EventStore) -> None:
    session = made(hasty)
    time.sleep(EXPIRY_S)
    lease = store.acquire_lease("scheduler", "here", 3600.0)
    assert lease is not None
    expiry = SessionExpiry(store, lease, EXPIRY_S)
    expiry.do(EXPIRY_S)
    row = store.queries.session(OWNER, session)
    assert row is not None and row.ended_us is None


def test_a_leader_that_was_replaced_ends_nothing(hasty: Tinker, expiry: SessionExpiry) -> None:
    session, store = made(hasty), hasty.api.store
    time.sleep(EXPIRY_S)
    lease = expiry._lease
    store.release_lease(lease)
    assert store.acquire_lease("scheduler", "there", 3600.0) is not None
    expiry.do(EXPIRY_S)
    row = store.queries.session(OWNER, session)
    assert row is not None and row.ended_us is None
