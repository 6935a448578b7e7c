"""What one key and one tenant may have under way; what it was is free again, whatever became of it."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest

from tests.support.api_driver import ApiDriver, datum, problem, record_environment
from tinkerbell.config import Limits, Settings
from tinkerbell.events.store import EventStore

LIMITS = Limits(
    max_requests_per_key=6, max_polls=3, max_streams=2, max_upload_bytes=300_000, max_upload_bytes_in_all=400_000
)
ASKED = {"prompt": [1], "params": {"max_tokens": 1}}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def api(settings: Settings, sqlite_store: EventStore) -> Iterator[ApiDriver]:
    record_environment(sqlite_store)
    with ApiDriver(msgspec.structs.replace(settings, auth="keys", limits=LIMITS), sqlite_store) as driver:
        yield driver


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


def held(api: ApiDriver) -> Any:
    return api.app.state.context.shares


async def beside(
    api: ApiDriver, count: int, call: Callable[[], Any], under_way: Callable[[], bool], look: Callable[[], Any]
) -> Any:
    """What `look` finds while `count` calls are under way, and after they were broken off."""
    calls = [asyncio.ensure_future(call()) for _ in range(count)]
    try:
        await until(under_way)
        found = await look()
    finally:
        for each in calls:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    shares = held(api)
    await until(lambda: not (shares._by_key or shares._waiting or shares._bytes or shares._bytes_in_all))
    return found


@pytest.mark.parametrize("route", ["v1", "alias", "tinker", "tinker, many"])
def test_polls_of_a_tenant(api: ApiDriver, route: str) -> None:
    future = api.submit("/v1/sample", "alice", ASKED)["id"]
    session = api.post("/api/v1/create_session", "alice", {"sdk_version": "0.38.0", "tags": []}).json()["session_id"]
    made = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    sampler = api.post("/api/v1/create_sampling_session", "alice", made).json()["sampling_session_id"]

    def poll(tenant: str = "alice") -> Any:
        match route:
            case "v1":
                return api.acall("GET", f"/v1/futures/{future}?wait_s=60", tenant)
            case "alias":
                return api.acall("POST", "/retrieve_future", tenant, json={"future_id": future, "wait_s": 60})
            case "tinker":
                return api.acall("POST", "/api/v1/retrieve_future", tenant, json={"request_id": str(future)})
            case _:
                target = {"target": {"sampling_session_id": sampler}, "timeout": 60}
                return api.acall("POST", "/api/v1/retrieve_futures", tenant, json=target)

    async def look() -> tuple[httpx.Response, ...]:
        return await poll(), await api.acall("GET", "/v1/usage", "alice"), await poll("bob")

    api.key("bob")
    waiting = lambda: held(api)._waiting["alice", "poll"] == LIMITS.max_polls  # noqa: E731
    refused, read, others = api.run(beside(api, LIMITS.max_polls, poll, waiting, look))
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "1"
    assert "requests of yours wait for an answer; there may be 3" in refused.json()["detail"]
    assert (read.status_code, others.status_code) == (200, 404)


def test_requests_of_a_key(api: ApiDriver) -> None:
    path = f"/v1/futures/{api.submit('/v1/sample', 'alice', ASKED)['id']}?wait_s=60"
    limits = msgspec.structs.replace(LIMITS, max_polls=100)
    held(api)._limits = limits

    async def look() -> tuple[httpx.Response, ...]:
        return await api.acall("GET", "/v1/usage", "alice"), await api.acall("GET", "/v1/usage", "bob")

    api.key("bob")
    refused, others = api.run(
        beside(
            api,
            limits.max_requests_per_key,
            lambda: api.acall("GET", path, "alice"),
            lambda: held(api)._by_key.total() == limits.max_requests_per_key,
            look,
        )
    )
    assert "6 requests of this key are under way" in problem(refused, 429, "too-many-requests")["detail"]
    assert others.status_code == 200


def body(num_bytes: int) -> bytes:
    """A fwdbwd that is right, and padded."""
    return msgspec.json.encode({"data": [datum()]}) + b" " * num_bytes


def test_bytes_of_bodies(api: ApiDriver) -> None:
    adapter = api.adapter("alice")
    path = f"/v1/adapters/{adapter}/fwdbwd"
    api.key("bob")

    async def halting(announced: int | None) -> httpx.Response:
        async def pieces() -> Any:
            yield body(0) if announced is None else b" "
            if announced is None:
                yield b" " * 145_000
            await asyncio.sleep(60)

        headers = JSON if announced is None else {**JSON, "Content-Length": str(announced)}
        return await api.acall("POST", path, "alice", content=pieces(), headers=headers)

    async def look() -> tuple[httpx.Response, ...]:
        large = body(145_000)
        return (
            await api.acall("POST", path, "alice", content=large, headers=JSON),
            await api.acall("POST", path, "bob", content=large, headers=JSON),
            await api.acall("POST", path, "alice", content=body(1000), headers=JSON),
        )

    for announced in (140_000, None):
        held_bytes = lambda: held(api)._bytes_in_all >= 280_000  # noqa: E731
        same, other, small = api.run(beside(api, 2, lambda a=announced: halting(a), held_bytes, look))
        assert "bytes of bodies of yours are under way" in problem(same, 429, "too-many-requests")["detail"]
        assert same.headers["Retry-After"] == "1"
        problem(other, 503, "unavailable")
        assert small.status_code == 202
    assert api.call("POST", path, "alice", content=body(250_000), headers=JSON).status_code == 202
