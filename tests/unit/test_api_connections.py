"""Connections that nobody invited: heads without an end, bodies that trickle, sockets that say nothing. Each is ended
by itself, and a neighbour is answered meanwhile."""

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import httpx
import msgspec
import pytest

from tests.support.api_driver import record_environment
from tinkerbell.api import server as api_server
from tinkerbell.api.app import create_app
from tinkerbell.api.server import ApiServer
from tinkerbell.config import Http, Settings
from tinkerbell.events.store import EventStore

HTTP = Http(
    max_connections=12,
    max_connections_per_address=12,
    max_head_bytes=4096,
    head_timeout_s=0.6,
    idle_timeout_s=1.0,
    transfer_grace_s=0.6,
    min_bytes_per_s=2000.0,
)
PATIENCE_S = 20.0
"""Deadline of what should take a second."""


@contextmanager
def running(settings: Settings, store: EventStore) -> Iterator[ApiServer]:
    started = threading.Event()
    server = ApiServer(create_app(settings, store), "127.0.0.1", 0, lambda _: started.set())
    thread = threading.Thread(target=server.run)
    thread.start()
    assert started.wait(PATIENCE_S)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, sqlite_template: object) -> Iterator[ApiServer]:
    """One server for all of it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(api_server, "CHECK_S", 0.1)
    data_dir = tmp_path_factory.mktemp("data")
    (data_dir / "tinkerbell.db").write_bytes(sqlite_template.read_bytes())  # type: ignore[attr-defined]
    settings = Settings(data_dir=str(data_dir), executor="fake", http=HTTP)
    store = EventStore.open(settings)
    record_environment(store)
    with running(settings, store) as api:
        yield api
    store.close()
    patch.undo()


def connect(server: ApiServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), PATIENCE_S)
    made.settimeout(PATIENCE_S)
    return made


def end_of(connection: socket.socket) -> bytes:
    """What is answered until the server ends the connection; it must."""
    received = b""
    with closing(connection):
        try:
            while piece := connection.recv(65536):
                received += piece
        except ConnectionError:
            pass
    return received


def send(connection: socket.socket, *pieces: bytes, every_s: float = 0.0) -> None:
    """As much as the other side takes."""
    try:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(every_s)
    except ConnectionError:
        pass


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def neighbour(server: ApiServer) -> None:
    """Somebody else is answered."""
    assert httpx.get(f"{server.url}/healthz", timeout=PATIENCE_S).status_code == 200


JSON = {"Content-Type": "application/json"}
HOST = b"Host: localhost\r\n"
LONG = b"x" * (HTTP.max_head_bytes + 1)
ENDLESS = {
    "url": (b"GET /", *[b"a" * 1000] * 100),
    "url in one piece": (b"GET /" + LONG + b" HTTP/1.1\r\n" + HOST + b"\r\n",),
    "query": (b"GET /healthz?", *[b"a" * 1000] * 100),
    "method": (*[b"G" * 1000] * 100,),
    "header": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"X: ", *[b"a" * 1000] * 100),
    "header name": (b"GET /healthz HTTP/1.1\r\n" + HOST, *[b"a" * 1000] * 100),
    "header in one piece": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"X: " + LONG + b"\r\n\r\n",),
    "headers": (b"GET /healthz HTTP/1.1\r\n" + HOST, *[b"X: y\r\n" * 100] * 100),
    "second request": (
        b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\nGET /healthz HTTP/1.1\r\nX: ",
        *[b"a" * 1000] * 100,
    ),
    "chunk extension": (
        b"POST /v1/adapters HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
        b"\r\n1;",
        *[b"a" * 1000] * 100,
    ),
    "trailer": (
        b"POST /v1/adapters HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
        b"\r\n2\r\n{}\r\n0\r\nX: ",
        *[b"a" * 1000] * 100,
    ),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_has_no_end_is_cut(server: ApiServer, what: str) -> None:
    connection = connect(server)
    send(connection, *ENDLESS[what])
    neighbour(server)
    answer = end_of(connection)
    assert b" 202 " not in answer
    refused = {"method": b" 400 ", "chunk extension": b" 400 ", "trailer": b" 400 "}.get(what, b" 431 ")
    assert refused in answer or not answer, answer[:200]
    neighbour(server)


def test_a_head_within_the_limit_is_served(server: ApiServer) -> None:
    room = HTTP.max_head_bytes - 200
    with httpx.Client(timeout=PATIENCE_S) as client:
        for path, headers in ((f"/healthz?{'a' * room}", {}), ("/healthz", {"X": "a" * room})):
            assert client.get(server.url + path, headers=headers).status_code == 200


def test_a_refused_head_is_told_as_a_problem(server: ApiServer) -> None:
    answer = httpx.get(f"{server.url}/healthz", headers={"X": "a" * 5000}, timeout=PATIENCE_S)
    assert answer.status_code == 431
    assert answer.json()["detail"] == "The head of a request may have at most 4096 bytes."


def test_a_long_body_that_is_refused_is_told(server: ApiServer) -> None:
    """Though its sender goes on for a while."""
    for path, status_code in (("/v1/adapters", 413), ("/nowhere", 404)):
        answer = httpx.post(server.url + path, content=b" " * 20_000_000, headers=JSON, timeout=PATIENCE_S)
        assert answer.status_code == status_code
    neighbour(server)


BODY = b"POST /v1/adapters HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nContent-Length: 60000\r\n\r\n"
SLOW: dict[str, tuple[Callable[[socket.socket], None], int]] = {
    "nothing": (lambda _: None, 0),
    "line ends": (lambda c: send(c, *[b"\r\n"] * 40, every_s=0.05), 408),
    "head": (lambda c: send(c, b"GET / HTTP/1.1\r\nX: ", *[b"a"] * 40, every_s=0.05), 408),
    "head that stops": (lambda c: send(c, b"GET / HT"), 408),
    "body": (lambda c: send(c, BODY, *[b"1"] * 40, every_s=0.05), 408),
    "body that stops": (lambda c: send(c, BODY + b"[1"), 408),
    "body without a key": (lambda c: send(c, BODY.replace(b"v1/adapters", b"nowhere"), *[b"1"] * 5), 404),
    "next request": (lambda c: send(c, b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"), 200),
    "head of the next request": (lambda c: send(c, b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\nGET"), 200),
}


def test_what_does_not_come_is_not_waited_for(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once."""
    monkeypatch.setattr("tinkerbell.api.connection.LINGER_S", 0.5)
    answers: dict[str, int] = {}

    def wait(what: str, drip: Callable[[socket.socket], None]) -> None:
        connection = connect(server)
        drip(connection)
        answers[what] = status(end_of(connection))

    threads = [threading.Thread(target=wait, args=(what, drip)) for what, (drip, _) in SLOW.items()]
    for thread in threads:
        thread.start()
    neighbour(server)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert answers == {what: expected for what, (_, expected) in SLOW.items()}
    neighbour(server)


def test_a_slow_upload_that_keeps_its_pace_is_served(server: ApiServer) -> None:
    """It takes several times the grace."""
    body = b'{"name": "' + b"a" * 60 + b'"' + b" " * 8000 + b"}"
    head = BODY.replace(b"60000", str(len(body)).encode())
    with closing(connect(server)) as connection:
        pieces = [body[i : i + 400] for i in range(0, len(body), 400)]
        began = time.monotonic()
        send(connection, head, *pieces, every_s=0.1)
        assert time.monotonic() - began > 3 * HTTP.transfer_grace_s
        assert status(connection.recv(65536)) == 202


def test_who_does_not_read_is_ended(server: ApiServer) -> None:
    """The answers fill every buffer between."""
    connection = connect(server)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    request = b"GET /schema/openapi.json HTTP/1.1\r\n" + HOST + b"\r\n"
    connection.setblocking(False)
    deadline, ended = time.monotonic() + PATIENCE_S, False
    while not ended and time.monotonic() < deadline:
        try:
            connection.send(request * 50)
        except BlockingIOError:
            time.sleep(0.05)
        except ConnectionError:
            ended = True
    connection.close()
    assert ended
    neighbour(server)


def test_who_waits_for_an_answer_may_wait(server: ApiServer) -> None:
    """Longer than everything else may take."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client, client.stream("GET", "/v1/events") as stream:
        future = client.post("/v1/adapters", json={}).json()["id"]
        wait_s = 2 * HTTP.idle_timeout_s
        began = time.monotonic()
        answer = client.get(f"/v1/futures/{future}?wait_s={wait_s}")
        assert time.monotonic() - began >= wait_s
        assert answer.json()["state"] == "pending"
        lines = stream.iter_lines()
        next(lines)
        client.post("/v1/adapters", json={})
        assert any(line.startswith("event:") for line in lines)


def test_one_that_rests_makes_room(server: ApiServer) -> None:
    """First one that never asked for anything."""
    with httpx.Client(timeout=PATIENCE_S) as client:
        assert client.get(f"{server.url}/healthz").status_code == 200
        silent = [connect(server) for _ in range(3 * HTTP.max_connections)]
        neighbour(server)
        assert client.get(f"{server.url}/healthz").status_code == 200
        for connection in silent:
            connection.close()


def test_a_head_that_is_not_there_takes_no_room(server: ApiServer) -> None:
    begun = [connect(server) for _ in range(3 * HTTP.max_connections)]
    for connection in begun:
        send(connection, b"GET /healthz HTTP/1.1\r\nX: a")
    neighbour(server)
    for connection in begun:
        connection.close()


def test_where_all_are_at_work_a_new_one_is_refused(server: ApiServer) -> None:
    future = httpx.post(f"{server.url}/v1/adapters", json={}, timeout=PATIENCE_S).json()["id"]
    polling = [connect(server) for _ in range(HTTP.max_connections)]
    for connection in polling:
        send(connection, b"GET /v1/futures/%d?wait_s=60 HTTP/1.1\r\n" % future + HOST + b"\r\n")
    deadline = time.monotonic() + PATIENCE_S
    while (answer := _once(server)) is None or answer.status_code != 503:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert answer.headers["Retry-After"] == "1"
    for connection in polling:
        connection.close()
    while (answer := _once(server)) is None or answer.status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _once(server: ApiServer) -> httpx.Response | None:
    try:
        return httpx.get(f"{server.url}/healthz", timeout=PATIENCE_S)
    except httpx.TransportError:
        return None


def test_an_address_has_its_share(settings: Settings, sqlite_store: EventStore) -> None:
    http = msgspec.structs.replace(HTTP, max_connections_per_address=3, head_timeout_s=60.0)
    with running(msgspec.structs.replace(settings, http=http), sqlite_store) as server:
        ours = [connect(server) for _ in range(4)]
        # The first made room for the fourth, though there is room in all.
        assert end_of(ours[0]) == b""
        for connection in ours[1:]:
            connection.close()


BROKEN = {
    "in the head": b"GET /healthz HTTP/1.1\r\nX: ",
    "in the body": BODY + b"[1",
    "in a long poll": b"GET /v1/futures/%d?wait_s=2 HTTP/1.1\r\n" + HOST + b"\r\n",
    "in a long poll of the other protocol": b"POST /api/v1/retrieve_future HTTP/1.1\r\n"
    + HOST
    + b"Content-Type: application/json\r\nContent-Length: 17\r\n\r\n"
    + b'{"request_id":"1"}'[:17],
    "in a stream": b"GET /v1/events?after=0 HTTP/1.1\r\n" + HOST + b"\r\n",
    "before an answer": b"GET /schema/openapi.json HTTP/1.1\r\n" + HOST + b"\r\n",
}


@pytest.mark.parametrize("abort", [False, True])
def test_who_breaks_off_is_no_error(server: ApiServer, abort: bool, caplog: pytest.LogCaptureFixture) -> None:
    future = httpx.post(f"{server.url}/v1/adapters", json={}, timeout=PATIENCE_S).json()["id"]
    with caplog.at_level("INFO"):
        for what, sent in BROKEN.items():
            connection = connect(server)
            send(connection, sent % future if b"%d" in sent else sent)
            if what in ("in a stream",):
                connection.recv(100)
            time.sleep(0.05)
            if abort:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        neighbour(server)
        deadline = time.monotonic() + PATIENCE_S
        while server._crowd._by_address.total() > 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []
    assert any("the client broke off" in record.getMessage() for record in caplog.records)
