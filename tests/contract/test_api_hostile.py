"""Every route of both protocols, walked with what no name can be: an answer of 4xx, short, and a neighbour who notices
nothing. A new route is walked without being named here."""

import copy
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import msgspec
import msgspec.inspect as mi
import pytest
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from tests.support.api_driver import ApiDriver, lead, record_environment
from tinkerbell.api import bodies
from tinkerbell.api.tinker.routes import futures
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore

ODD = {
    "NUL": "a\0b",
    "line end": "a\nb",
    "3,000 characters": "x" * 3000,
    "digits that are none": "0.²5.1",
    "digits of another script": "٣",
    "many digits": "9" * 5000,
    "quotes": "' OR 1=1 --",
    "another's path": "../../etc/passwd",
    "not in the plane": "💥",
}
"""Texts for names, ids and numbers."""

STREAMS = {"/v1/events"}
"""What is odd there is no parameter's type; their answers do not end."""

MAX_ANSWER_BYTES = 4000


@pytest.fixture
def api(database_settings: Settings, store: EventStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiDriver]:
    monkeypatch.setattr(futures, "HOLD_S", 0.0)
    record_environment(store)
    lead(store)
    with ApiDriver(database_settings, store) as driver:
        yield driver
        store.check()


def operations(api: ApiDriver) -> Iterator[tuple[str, str, HTTPRoute, HTTPRouteHandler]]:
    """Method, path, and what serves it."""
    for route in api.app.routes:
        if isinstance(route, HTTPRoute):
            for method, (handler, _) in route.route_handler_map.items():
                if method not in ("OPTIONS", "HEAD"):
                    yield method, route.path_format, route, handler


def refuse(api: ApiDriver, method: str, path: str, **kwargs: Any) -> None:
    """Whatever it is answered with is neither the server's fault nor long."""
    answer = api.call(method, path, **kwargs)
    told = f"{method} {path[:200]} {str(kwargs)[:300]}: {answer.status_code} {answer.text[:500]}"
    assert answer.status_code < 500, told
    assert answer.status_code < 400 or len(answer.content) < MAX_ANSWER_BYTES, told
    assert answer.status_code < 400 or ("x" * 101 not in answer.text and "9" * 101 not in answer.text), told


def neighbour(api: ApiDriver) -> None:
    """Somebody else is served as if nothing had happened."""
    assert api.submit("/v1/adapters", tenant=None)["state"] == "pending"


def test_odd_paths(api: ApiDriver) -> None:
    walked = 0
    for method, path, route, _ in operations(api):
        for name in route.path_parameters:
            for text in ODD.values():
                filled = path.format_map(dict.fromkeys(route.path_parameters, "1") | {name: quote(text, safe="")})
                refuse(api, method, filled, json={} if method in ("POST", "PUT") else None)
                walked += 1
    assert walked > 100
    neighbour(api)


@pytest.mark.parametrize("path", ["/schema/assets/a%00b", "/%00", "/v1/%00/x", "/api/v1/%00", "/schema/%0a", "/%ff%fe"])
def test_odd_paths_that_are_no_routes(api: ApiDriver, path: str) -> None:
    assert api.get(path).status_code == 404
    neighbour(api)


def test_odd_queries(api: ApiDriver) -> None:
    walked = 0
    for method, path, route, handler in operations(api):
        if method != "GET" or path in STREAMS:
            continue
        filled = path.format_map(dict.fromkeys(route.path_parameters, "1"))
        names = [name for name in handler.parsed_fn_signature.parameters if name not in route.path_parameters]
        for name in ("anything", *names):
            for text in ODD.values():
                refuse(api, method, f"{filled}?{name}={quote(text)}")
                walked += 1
    assert walked > 200
    assert api.get("/v1/adapters?limit=%00").status_code == 400
    assert api.get("/v1/events?adapter_id=%00").status_code == 400
    neighbour(api)


@pytest.mark.parametrize(
    "name",
    ["Idempotency-Key", "X-Idempotency-Key", "X-SDK-Version", "X-Request-ID", "Traceparent", "Last-Event-ID", "Accept"],
)
def test_odd_headers(api: ApiDriver, name: str) -> None:
    session = {"sdk_version": "0.38.0", "tags": []}
    for text in ODD.values():
        headers = {name.encode(): text.replace("\0", "\x01").encode()}
        refuse(api, "POST", "/v1/adapters", json={}, headers=headers)
        refuse(api, "POST", "/api/v1/create_session", json=session, headers=headers)
        refuse(api, "POST", "/api/v1/copy_weights", json={"source_path": "tinker://a/weights/b"}, headers=headers)
        refuse(api, "GET", "/v1/adapters", headers=headers)
    long = api.call("POST", "/api/v1/create_session", json=session, headers={"X-Idempotency-Key": "k" * 3000})
    assert long.status_code == 400
    assert "200 printable" in long.json()["detail"]
    neighbour(api)


def example(kind: mi.Type) -> Any:
    """Something of the type, as small as it may be."""
    match kind:
        case mi.StructType():
            return {field.encode_name: example(field.type) for field in kind.fields if field.required}
        case mi.ListType() | mi.VarTupleType():
            return [example(kind.item_type)] if kind.min_length else []
        case mi.UnionType():
            return example(kind.types[0])
        case mi.LiteralType():
            return kind.values[0]
        case mi.IntType() | mi.FloatType():
            return kind.ge or 1
        case mi.StrType():
            return "x"
        case mi.BoolType():
            return False
        case mi.DictType() | mi.AnyType():
            return {}
        case mi.DateTimeType():
            return "2026-01-01T00:00:00Z"
        case mi.NoneType():
            return None
        case other:
            raise AssertionError(f"no example of {other}")


def deep(levels: int) -> Any:
    nested: Any = 1
    for _ in range(levels):
        nested = {"a": [nested]}
    return nested


def odd_values(kind: mi.Type) -> list[Any]:
    """What somebody may send in the place of a value of the type."""
    match kind:
        case mi.UnionType():
            return [value for each in kind.types for value in odd_values(each)]
        case mi.StrType():
            return [*ODD.values()]
        case mi.IntType():
            return [-1, 2**63, 10**30, 1.5, "²"]
        case mi.FloatType():
            return [-1, 1e308, 10**400]
        case mi.AnyType():
            return [deep(225), "a\0b"]
        case mi.DictType():
            values = [deep(225)] if isinstance(kind.value_type, mi.AnyType) else odd_values(kind.value_type)
            return [{"a": value} for value in values] + [{"a\0b": example(kind.value_type)}, {"x" * 3000: 1}]
        case mi.ListType() | mi.VarTupleType():
            return [[value] for value in odd_values(kind.item_type)] + [[[]] * 5000]
        case mi.DateTimeType():
            return ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59+14:00", "x"]
        case _:
            return []


def odd_bodies(kind: mi.StructType) -> Iterator[dict[str, Any]]:
    """Bodies that are right but for one value, at any depth."""
    whole = example(kind)
    for field in kind.fields:
        for value in odd_values(field.type):
            yield whole | {field.encode_name: value}
        for inner in field.type.types if isinstance(field.type, mi.UnionType) else (field.type,):
            item = inner.item_type if isinstance(inner, mi.ListType) else inner
            if isinstance(item, mi.StructType):
                for odd in odd_bodies(item):
                    yield whole | {field.encode_name: odd if item is inner else [odd]}


def test_odd_bodies(api: ApiDriver) -> None:
    session = api.post("/api/v1/create_session", json={"sdk_version": "0.38.0", "tags": []}).json()["session_id"]
    adapter = api.adapter()
    real = {"session_id": session, "adapter_id": adapter, "model_id": adapter, "base_model": "tiny"}
    walked = 0
    for method, path, route, handler in operations(api):
        field = handler.parsed_data_field
        if field is None:
            continue
        filled = path.format_map({name: real.get(name, "1") for name in route.path_parameters})
        for odd in odd_bodies(mi.type_info(field.annotation)):
            body = {name: real[name] if value == "x" and name in real else value for name, value in odd.items()}
            refuse(api, method, filled, content=msgspec.json.encode(body), headers={"Content-Type": "application/json"})
            walked += 1
    assert walked > 500
    neighbour(api)


def test_a_long_body_goes_only_where_data_goes(api: ApiDriver) -> None:
    """Everywhere else it is refused before it is read."""
    long = b'{"user_metadata":{"a":[' + b"[]," * 40_000 + b"[]]}}"
    for method, path, route, handler in operations(api):
        field = handler.parsed_data_field
        if field is not None and field.annotation not in bodies.KINDS:
            filled = path.format_map(dict.fromkeys(route.path_parameters, "1"))
            answer = api.call(method, filled, content=long, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413, f"{method} {path}: {answer.status_code}"
            assert "65536" in answer.json()["detail"]
    neighbour(api)


def test_bodies_with_lists_of_numbers_are_those_that_carry_data(api: ApiDriver) -> None:
    """So that a new one is decoded apart, too."""

    def has_numbers(kind: mi.Type) -> bool:
        match kind:
            case mi.ListType(item_type=mi.IntType() | mi.FloatType()):
                return True
            case mi.ListType() | mi.VarTupleType():
                return has_numbers(kind.item_type)
            case mi.DictType():
                return has_numbers(kind.value_type)
            case mi.UnionType():
                return any(map(has_numbers, kind.types))
            case mi.StructType():
                return any(has_numbers(field.type) for field in kind.fields)
            case _:
                return False

    found = {
        handler.parsed_data_field.annotation for *_, handler in operations(api) if handler.parsed_data_field is not None
    }
    assert {cls for cls in found if has_numbers(copy.copy(mi.type_info(cls)))} == set(bodies.KINDS)
