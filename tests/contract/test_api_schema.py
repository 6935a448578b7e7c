"""The OpenAPI document is kept: generated requests, valid and not, get documented answers and never a 5xx."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.api_driver import ApiDriver, datum, lead, record_environment
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore

EXAMPLES = 12
"""Of each kind, for each operation."""

STREAMS = {"stream_events"}
"""Their answers do not end."""

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture
def api(settings: Settings, sqlite_store: EventStore) -> Iterator[ApiDriver]:
    record_environment(sqlite_store)
    lead(sqlite_store)
    with ApiDriver(settings, sqlite_store) as driver:
        yield driver


def known_ids(api: ApiDriver) -> dict[str, Any]:
    """One of everything, finished."""
    adapter = api.adapter()
    done = api.complete(f"/v1/adapters/{adapter}/fwdbwd", json={"data": [datum()]})
    saved = api.complete(f"/v1/adapters/{adapter}/checkpoints")["result"]
    return {"adapter_id": adapter, "checkpoint_id": saved["checkpoint_id"], "future_id": done["id"]}


def patient(values: Any) -> None:
    """Generated requests must not wait a minute."""
    if isinstance(values, dict) and isinstance(values.get("wait_s"), int | float):
        values["wait_s"] = min(values["wait_s"], 0.01)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_generated_requests(api: ApiDriver, mode: GenerationMode) -> None:
    document = api.get("/schema/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    ids, tried = known_ids(api), []
    for found in schema.get_all_operations():
        operation = found.ok()
        name = operation.definition.raw["operationId"]
        takes_something = "requestBody" in operation.definition.raw or "parameters" in operation.definition.raw
        if name in STREAMS or not (takes_something or mode is GenerationMode.POSITIVE):
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
            for parameter in case.path_parameters or {}:
                if existing:
                    case.path_parameters[parameter] = ids[parameter]
            patient(case.query)
            patient(case.body)
            request = case.as_transport_kwargs(base_url="http://localhost")
            content = {"content": request["data"]} if request.get("data") is not None else {}
            if request.get("json") is not None:
                content = {"json": request["json"]}
            # What is on the wire are bytes; the client takes no other text than ASCII.
            headers = {
                name: value.encode("latin-1", "replace") for name, value in (request.get("headers") or {}).items()
            }
            response = api.call(
                request["method"],
                request["url"],
                headers=headers,
                params=request.get("params"),
                **content,
            )
            case.validate_response(response, checks=CHECKS)
            if response.status_code >= 400:
                assert api.get("/v1/queue").status_code == 200  # a neighbour notices nothing

        check()
        tried.append(name)
    assert len(tried) >= 26
    api.store.check()
