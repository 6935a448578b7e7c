"""Usage, the audit log and the caller's own key, as the tinker SDK asks for them."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.api_driver import answer, create_key
from tests.support.tinker_driver import OWNER, STRANGER, Tinker

HOUR = timedelta(hours=1)


def this_hour() -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


def window(begin: datetime, end: datetime) -> dict[str, str]:
    return {"starting_on": begin.isoformat(), "ending_before": end.isoformat()}


def usage(tinker: Tinker, begin: datetime, end: datetime) -> Any:
    found = tinker.call("GET", "billing/usage/events", params=window(begin, end))
    assert found.status_code == 200, found.text
    return found.json()


def test_usage_by_the_hour_and_session(tinker: Tinker) -> None:
    session = tinker.ok("create_session", sdk_version="0.38.0", tags=[], user_metadata={"k": "v"})["session_id"]
    begin = this_hour()
    model = tinker.model(session)
    answer(tinker.api.store, int(tinker.forward_backward(model, 1, tokens=3).json()["request_id"]))
    tinker.saved(model, 2)
    found = usage(tinker, begin, this_hour() + HOUR)
    assert [event["event_info"] for event in found["data"]] == [
        {"type": "training", "token_count": 3},
        {"type": "checkpoint", "count": 1},
    ]
    assert {event["session_id"] for event in found["data"]} == {session}
    assert found["sessions"] == {session: {"user_metadata": {"k": "v"}}}
    assert usage(tinker, begin - HOUR, begin) == {"data": [], "sessions": {}}
    assert usage(Tinker(tinker.api, STRANGER), begin, this_hour() + HOUR)["data"] == []


@pytest.mark.parametrize(
    ("begin", "end", "detail"),
    [
        (this_hour(), this_hour() + timedelta(minutes=30), "full hour"),
        (this_hour(), this_hour(), "after starting_on"),
        (this_hour(), this_hour() + timedelta(days=15), "14 days"),
    ],
)
def test_bad_windows_are_named(tinker: Tinker, begin: datetime, end: datetime, detail: str) -> None:
    found = tinker.call("GET", "billing/usage/events", params=window(begin, end))
    assert found.status_code == 400 and detail in found.json()["detail"]


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:00:00-12:00", "9999-12-31T23:00:00Z"])
def test_the_ends_of_time(tinker: Tinker, at: str) -> None:
    for begin, end in ((at, at), (at, "2026-01-01T00:00:00Z"), ("2026-01-01T00:00:00Z", at)):
        params = {"starting_on": begin, "ending_before": end}
        assert tinker.call("GET", "billing/usage/events", params=params).status_code == 400
    for day in ("0001-01-01", "9999-12-31"):
        assert tinker.call("GET", "audit", params={"day": day}).json() == {"entries": []}


def test_storage_is_what_can_be_used(tinker: Tinker) -> None:
    assert tinker.call("GET", "billing/usage/checkpoints/current").json() == {"data": []}
    model = tinker.model()
    for seq, name in enumerate(("one", "two")):
        tinker.saved(model, seq, name)
    (held,) = tinker.call("GET", "billing/usage/checkpoints/current").json()["data"]
    assert held["checkpoint_count"] == 2 and held["user_name"] == OWNER
    sizes = [row.num_bytes for row in tinker.api.store.queries.checkpoints(OWNER)]
    assert held["size_bytes"] == sum(sizes) > 0
    assert tinker.call("DELETE", f"training_runs/{model}/checkpoints/weights/one").status_code == 204
    (held,) = tinker.call("GET", "billing/usage/checkpoints/current").json()["data"]
    assert held["checkpoint_count"] == 1


def test_the_audit_log_of_a_day(tinker: Tinker) -> None:
    if datetime.now(UTC).time() > (datetime.min + timedelta(hours=23, minutes=59, seconds=30)).time():
        time.sleep(40)  # a day must not end in the middle of it
    model = tinker.model()
    path = tinker.saved(model, 1)
    assert tinker.call("POST", f"training_runs/{model}/checkpoints/weights/step-1/publish").status_code == 204
    found = tinker.call("GET", "audit").json()["entries"]
    names = [entry["event"] for entry in found]
    assert names == ["key_created", "session_started", "add_lora_requested", "save_requested", "checkpoint_changed"]
    assert all("key_hash" not in entry["event_details"] for entry in found)
    key = found[0]["event_details"]["key_id"]
    assert {entry["event_details"]["key"] for entry in found[1:]} == {key}
    (saved,) = [entry for entry in found if entry["tinker_path"]]
    assert (saved["tinker_path"], saved["model_id"]) == (path, model)
    only = tinker.call("GET", "audit", params={"event_type": "checkpoints"}).json()["entries"]
    assert only == [entry for entry in found if entry["event"] in ("save_requested", "checkpoint_changed")]
    assert tinker.call("GET", "audit", params={"event_type": "teams"}).json() == {"entries": []}
    assert tinker.call("GET", "audit", params={"day": "2020-01-01"}).json() == {"entries": []}
    assert tinker.call("GET", "audit", params={"event_type": "pets"}).status_code == 400
    others = Tinker(tinker.api, STRANGER).call("GET", "audit").json()["entries"]
    assert [entry["event"] for entry in others] == ["key_created"]


def test_a_key_shows_and_revokes_itself(tinker: Tinker) -> None:
    shown = tinker.call("GET", "auth/apikey/me").json()
    assert shown["details"]["org_details"]["name"] == OWNER and isinstance(shown["key_id"], int)
    other = create_key(tinker.api.store, OWNER)
    headers = {"X-API-Key": f"tml-{other}"}
    assert tinker.api.call("GET", "/api/v1/auth/apikey/me", headers=headers).json()["name"] in other
    assert tinker.api.call("DELETE", "/api/v1/auth/apikey/me", headers=headers).status_code == 204
    assert tinker.api.store.queries.key(shown["name"]).revoked_us is None
    row = tinker.api.store.queries.key(other.split("-")[1])
    assert row is not None and row.revoked_us is not None
    tinker.api.store.check()
