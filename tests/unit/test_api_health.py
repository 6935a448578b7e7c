"""Probes, metrics, the OpenAPI document and its page: public, and telling nothing of any tenant."""

import json
import re
from collections.abc import Iterator

import msgspec
import pytest

from tests.support.api_driver import ApiDriver, problem, record_environment
from tinkerbell.api import schemas
from tinkerbell.config import Settings
from tinkerbell.events.leases import SCHEDULER
from tinkerbell.events.store import EventStore


@pytest.fixture
def api(settings: Settings, sqlite_store: EventStore) -> Iterator[ApiDriver]:
    with ApiDriver(settings, sqlite_store) as driver:
        yield driver


def test_ready_once_the_environment_is_known(api: ApiDriver) -> None:
    assert api.get("/healthz").json()["durability"] == "full"
    waiting = api.get("/readyz")
    assert (waiting.status_code, waiting.json()["ready"]) == (503, False)
    refused = api.post("/v1/adapters")
    problem(refused, 503, "unavailable")
    assert refused.headers["retry-after"] == "1"
    problem(api.get("/v1/models"), 503, "unavailable")
    record_environment(api.store)
    assert "scheduler" in api.get("/readyz").json()["reason"]
    lease = api.store.acquire_lease(SCHEDULER, "a scheduler", 60.0)
    assert lease is not None
    ready = api.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "reason": ""})
    api.submit("/v1/adapters")
    api.store.release_lease(lease)
    assert api.get("/readyz").status_code == 503


def test_a_dead_scheduler_is_told_and_takes_no_more(settings: Settings, sqlite_store: EventStore) -> None:
    record_environment(sqlite_store)
    failures: list[Exception] = []
    with ApiDriver(settings, sqlite_store, scheduler_failed=lambda: failures[0] if failures else None) as api:
        future = api.submit("/v1/adapters")
        failures.append(RuntimeError("a secret path"))
        for path in ("/healthz", "/readyz"):
            answered = api.get(path)
            assert answered.status_code == 503
            assert "secret" not in answered.text
        problem(api.post("/v1/adapters"), 503, "unavailable")
        assert api.get(f"/v1/futures/{future['id']}").json()["state"] == "pending"


def test_metrics_group_ids(api: ApiDriver) -> None:
    record_environment(api.store)
    adapter = api.adapter()
    api.get(f"/v1/adapters/{adapter}")
    text = api.get("/metrics").text
    assert 'path="/v1/adapters/{adapter_id}"' in text
    assert adapter not in text


def test_the_page_needs_nothing_from_elsewhere(api: ApiDriver) -> None:
    page = api.get("/schema")
    assert page.headers["content-type"].startswith("text/html")
    assert re.findall(r"https?:|//[a-z]", page.text.replace("// ", "")) == []
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    local = [source for source in sources if source.startswith("/")]
    assert len(local) == 3
    for source in local:
        assert api.get(source).status_code == 200, source
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_the_document_has_the_exact_wire_types(api: ApiDriver) -> None:
    document = api.get("/schema/openapi.json").json()
    assert document["components"]["schemas"] == json.loads(msgspec.json.encode(schemas.wire_schemas()))
    rank = document["components"]["schemas"]["LoraConfig"]["properties"]["rank"]
    assert (rank["minimum"], rank["maximum"]) == (1, 1024)
    targets = document["components"]["schemas"]["DatumBody"]["properties"]["targets"]
    assert "nothing is shifted" in targets["description"]


def test_every_operation_is_named_described_and_has_problems(api: ApiDriver) -> None:
    document = api.get("/schema/openapi.json").json()
    names = []
    for path, item in document["paths"].items():
        for operation in item.values():
            names.append(operation["operationId"])
            assert operation["description"], path
            assert operation["tags"], path
            errors = {status: body for status, body in operation["responses"].items() if status >= "400"}
            assert errors, path
            for status, body in errors.items():
                expected = "application/json" if path in ("/healthz", "/readyz") else "application/problem+json"
                assert list(body["content"]) == [expected], (path, status)
    assert len(names) == len(set(names)) >= 30


def test_every_answer_names_its_request(api: ApiDriver) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    given = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "X-Request-ID": "mine"}
    assert api.get("/healthz", headers=given).headers["x-request-id"] == trace
    assert api.get("/nowhere", headers={"X-Request-ID": "mine"}).headers["x-request-id"] == "mine"
    for odd in ("", "with space", "x" * 129):
        assert re.fullmatch("[0-9a-f]{32}", api.get("/v1/usage", headers={"X-Request-ID": odd}).headers["x-request-id"])


def test_a_bug_is_logged_and_not_shown(api: ApiDriver, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("internal detail")

    api.store.queries.usage = broken  # type: ignore[method-assign,assignment]
    answered = api.get("/v1/usage")
    body = problem(answered, 500, "server-error")
    assert "internal detail" not in answered.text
    assert answered.headers["x-request-id"] in body["detail"]
    assert "internal detail" in caplog.text
    assert answered.headers["x-request-id"] in caplog.text
