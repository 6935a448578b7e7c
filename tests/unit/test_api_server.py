"""The app behind a real socket: streams of the log, long polls, and an end within seconds."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import msgspec
import pytest
from litestar import Litestar
from prometheus_client import REGISTRY

from tests.support.api_driver import answer, create_key, record_environment, revoke_key
from tests.support.waiting import AT_ONCE_S, PATIENCE_S, eventually
from tinkerbell import wire
from tinkerbell.api import auth
from tinkerbell.api.app import create_app
from tinkerbell.api.routes import events
from tinkerbell.api.server import ApiServer, serve_api
from tinkerbell.config import Settings
from tinkerbell.errors import InvalidRequest, ServerError
from tinkerbell.events.store import EventStore


class Running:
    """A server in a thread."""

    def __init__(self, app: Litestar) -> None:
        started = threading.Event()
        self.server = ApiServer(app, "127.0.0.1", 0, lambda url: started.set())
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        assert started.wait(PATIENCE_S)

    def stop(self) -> float:
        """As a signal would; seconds it took."""
        began = time.monotonic()
        self.server.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return time.monotonic() - began


@contextmanager
def running(settings: Settings, store: EventStore) -> Iterator[tuple[Running, httpx.Client]]:
    server = Running(create_app(settings, store))
    try:
        with httpx.Client(base_url=server.server.url, timeout=30) as client:
            yield server, client
    finally:
        server.stop()


@pytest.fixture
def live(settings: Settings, sqlite_store: EventStore) -> Iterator[tuple[Running, httpx.Client]]:
    record_environment(sqlite_store)
    with running(settings, sqlite_store) as both:
        yield both


def take(lines: Iterator[str], count: int) -> list[tuple[int, str, wire.LogEvent]]:
    """The next events of a stream: id, type, content."""
    found = []
    fields: dict[str, str] = {}
    while len(found) < count:
        line = next(lines)
        if line == "" and "data" in fields:
            content = msgspec.json.decode(fields["data"], type=wire.LogEvent)
            found.append((int(fields["id"]), fields["event"], content))
        if line == "":
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
    return found


def add_lora(client: httpx.Client) -> int:
    response = client.post("/v1/adapters", json={})
    assert response.status_code == 202, response.text
    position: int = response.json()["id"]
    return position


def test_the_stream_has_the_past_and_what_comes(live: tuple[Running, httpx.Client], sqlite_store: EventStore) -> None:
    _, client = live
    first = add_lora(client)
    with client.stream("GET", "/v1/events?after=0") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        ((position, kind, event),) = take(lines, 1)
        assert (position, kind) == (first, "add_lora.requested")
        assert (event.position, event.seq, event.data["base_model"]) == (first, 0, "tiny")
        result = answer(sqlite_store, first)
        ((position, kind, event),) = take(lines, 1)
        assert (position, kind, event.causation) == (result.position, "add_lora.completed", first)
        assert event.hash == result.hash


def test_a_broken_stream_goes_on_where_it_was(live: tuple[Running, httpx.Client]) -> None:
    _, client = live
    positions = [add_lora(client) for _ in range(5)]
    with client.stream("GET", "/v1/events?after=0") as stream:
        seen = [position for position, _, _ in take(stream.iter_lines(), 3)]
    with client.stream("GET", "/v1/events?after=0", headers={"Last-Event-ID": str(seen[-1])}) as stream:
        seen += [position for position, _, _ in take(stream.iter_lines(), 2)]
    assert seen == positions


def test_without_a_position_only_the_future_is_told(live: tuple[Running, httpx.Client]) -> None:
    _, client = live
    add_lora(client)
    with client.stream("GET", "/v1/events") as stream:
        lines = stream.iter_lines()
        next(lines)
        later = add_lora(client)
        assert [position for position, _, _ in take(lines, 1)] == [later]


def test_pages_larger_than_one_read_arrive_whole(
    live: tuple[Running, httpx.Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client = live
    monkeypatch.setattr(events, "_PAGE", 2)
    positions = [add_lora(client) for _ in range(7)]
    with client.stream("GET", "/v1/events?after=0") as stream:
        assert [position for position, _, _ in take(stream.iter_lines(), 7)] == positions


def test_a_stream_has_its_tenants_and_its_adapters_events_only(settings: Settings, sqlite_store: EventStore) -> None:
    record_environment(sqlite_store)
    keys = {tenant: create_key(sqlite_store, tenant) for tenant in ("alice", "bob")}
    with running(msgspec.structs.replace(settings, auth="keys"), sqlite_store) as (_, client):

        def post(tenant: str) -> wire.Future:
            response = client.post("/v1/adapters", json={}, headers={"X-API-Key": keys[tenant]})
            return msgspec.json.decode(response.content, type=wire.Future)

        ours = [post("alice"), post("bob"), post("alice")]
        headers = {"X-API-Key": keys["alice"]}
        with client.stream("GET", "/v1/events?after=0", headers=headers) as stream:
            seen = take(stream.iter_lines(), 3)
            assert [position for position, _, _ in seen][1:] == [ours[0].id, ours[2].id]
        path = f"/v1/events?after=0&adapter_id={ours[2].adapter_id}"
        with client.stream("GET", path, headers=headers) as stream:
            assert [position for position, _, _ in take(stream.iter_lines(), 1)] == [ours[2].id]


def test_idle_streams_are_pinged_and_end_with_their_key(
    settings: Settings, sqlite_store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "PING_S", 0.1)
    monkeypatch.setattr(auth, "CACHE_TTL_S", 0.0)
    key = create_key(sqlite_store, "alice")
    with (
        running(msgspec.structs.replace(settings, auth="keys"), sqlite_store) as (_, client),
        client.stream("GET", "/v1/events", headers={"X-API-Key": key}) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines).startswith(": after ")
        assert next(line for line in lines if line.startswith(": ping"))
        revoke_key(sqlite_store, "alice", key)
        # The stream ends; if it did not, this would time out.
        assert len(list(lines)) < 1000


def polls_in_progress() -> float:
    """By the server's own metrics."""
    labels = {"method": "GET", "path": "/v1/futures/{future_id}", "status_code": "200", "app_name": "tinkerbell"}
    return REGISTRY.get_sample_value("tinkerbell_requests_in_progress", labels) or 0.0


def test_a_server_with_listeners_ends_within_seconds(settings: Settings, sqlite_store: EventStore) -> None:
    record_environment(sqlite_store)
    with running(settings, sqlite_store) as (server, client):
        future = add_lora(client)
        answers: list[httpx.Response] = []

        def poll() -> None:
            answers.append(httpx.get(f"{server.server.url}/v1/futures/{future}?wait_s=60", timeout=90))

        polls = [threading.Thread(target=poll) for _ in range(3)]
        with client.stream("GET", "/v1/events") as stream:
            lines = stream.iter_lines()
            next(lines)
            for thread in polls:
                thread.start()
            eventually(lambda: polls_in_progress() == len(polls))
            time.sleep(0.2)
            assert not answers
            took_s = server.stop()
            list(lines)
        for thread in polls:
            thread.join(PATIENCE_S)
        assert took_s < AT_ONCE_S, "it waited for those who wait for it"
        assert [response.json()["state"] for response in answers] == ["pending"] * 3


def test_a_port_in_use_is_said(settings: Settings, sqlite_store: EventStore) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServerError, match="cannot listen on 127"):
            serve_api(create_app(settings, sqlite_store), "127.0.0.1", taken.getsockname()[1])


def test_a_local_app_is_not_served_to_others(settings: Settings, sqlite_store: EventStore) -> None:
    with pytest.raises(InvalidRequest, match="reachable from elsewhere"):
        serve_api(create_app(settings, sqlite_store), "0.0.0.0", 0)
