"""Generated requests of the tinker protocol, valid and not: never a 5xx, and a neighbour who notices nothing."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from litestar.routes import HTTPRoute
from schemathesis import Case, GenerationMode

from tests.support.api_driver import ApiDriver, datum, record_environment
from tinkerbell.api.tinker.routes import futures
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore

EXAMPLES = 10
"""Of each kind, for each operation."""


@pytest.fixture
def api(settings: Settings, sqlite_store: EventStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiDriver]:
    monkeypatch.setattr(futures, "HOLD_S", 0.0)
    record_environment(sqlite_store)
    with ApiDriver(settings, sqlite_store) as driver:
        yield driver


def document(api: ApiDriver) -> dict[str, Any]:
    """The protocol as OpenAPI: its clients are not written by hand, so the server does not publish one."""
    paths: dict[str, dict[str, Any]] = {}
    for route in api.app.routes:
        if not isinstance(route, HTTPRoute) or not route.path.startswith("/api/v1"):
            continue
        for method, (handler, _) in route.route_handler_map.items():
            if method in ("OPTIONS", "HEAD"):
                continue
            parameters = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                for name in route.path_parameters
            ]
            parameters += [
                {"name": name, "in": "query", "schema": {"type": ["string", "integer"]}}
                for name in handler.parsed_fn_signature.parameters
                if name not in route.path_parameters
            ]
            operation: dict[str, Any] = {"parameters": parameters, "responses": {"200": {"description": ""}}}
            if (field := handler.parsed_data_field) is not None:
                schema = inlined(*msgspec.json.schema_components([field.annotation], ref_template="{name}"))
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
            paths.setdefault(route.path_format, {})[method.lower()] = operation
    return {"openapi": "3.1.0", "info": {"title": "tinker", "version": "0"}, "paths": paths}


def inlined(schemas: Any, components: dict[str, Any]) -> Any:
    """The first schema with what it refers to in its place."""

    def put(node: Any) -> Any:
        if isinstance(node, list):
            return [put(each) for each in node]
        if not isinstance(node, dict):
            return node
        return put(components[node["$ref"]]) if "$ref" in node else {name: put(each) for name, each in node.items()}

    return put(schemas[0])


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_generated_requests(api: ApiDriver, mode: GenerationMode) -> None:
    session = api.post("/api/v1/create_session", json={"sdk_version": "0.38.0", "tags": []}).json()["session_id"]
    adapter = api.adapter()
    future = api.complete(f"/v1/adapters/{adapter}/fwdbwd", json={"data": [datum()]})["id"]
    real = {
        "session_id": session,
        "run_id": adapter,
        "model_id": adapter,
        "request_id": str(future),
        "base_model": "tiny",
        "kind": "weights",
    }
    tried = 0
    for found in schemathesis.openapi.from_dict(document(api)).get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and "requestBody" not in operation.definition.raw:
            continue

        @effort(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode), existing=st.booleans())
        def check(case: Case, existing: bool) -> None:
            for given_values in (case.path_parameters, case.body):
                for name in real if existing and isinstance(given_values, dict) else ():
                    if name in given_values:
                        given_values[name] = real[name]
            request = case.as_transport_kwargs(base_url="http://localhost")
            content = {"content": request["data"]} if request.get("data") is not None else {}
            if request.get("json") is not None:
                content = {"json": request["json"]}
            headers = {
                name: value.encode("latin-1", "replace") for name, value in (request.get("headers") or {}).items()
            }
            answer = api.call(
                request["method"], request["url"], headers=headers, params=request.get("params"), **content
            )
            assert answer.status_code < 500, f"{request}: {answer.status_code} {answer.text[:500]}"
            if answer.status_code >= 400:
                assert "detail" in answer.json()
                assert api.get("/v1/queue").status_code == 200

        check()
        tried += 1
    assert tried > 15
    api.store.check()
