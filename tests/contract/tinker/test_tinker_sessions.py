"""What is told of sessions; the search for them."""

from datetime import datetime
from typing import Any

import pytest

from tests.support.tinker_driver import OWNER, STRANGER, Tinker


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
