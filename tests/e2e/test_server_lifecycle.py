"""Starting a server, refusing to start one, and ending it within seconds whoever is listening."""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests.support.server import client_of, fake_server
from tests.support.waiting import AT_ONCE_S, PATIENCE_S, eventually
from tinkerbell.cli.main import run
from tinkerbell.cli.process import ServerProcess
from tinkerbell.errors import ServerError, Unauthorized
from tinkerbell.sdk import Datum

DATA = [Datum(tokens=[1, 2, 3], targets=[2, 3, 4])]


def test_starts_on_nothing_and_stops(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server:
        assert httpx.get(f"{server.url}/healthz").json()["status"] == "ok"
        assert httpx.get(f"{server.url}/readyz").json()["ready"] is True
        with client_of(server) as client:
            adapter = client.add_lora(rank=4, seed=1)
            adapter.forward_backward(DATA)
            assert adapter.optim_step().result(timeout=PATIENCE_S).step == 1
    assert server.returncode == 0
    log = server.log_file.read_text()
    assert "Tinkerbell is ready." in log
    assert server.url in log
    assert "Traceback" not in log


def test_sigterm_with_a_stream_and_long_polls(tmp_path: Path) -> None:
    with fake_server(tmp_path, latency_us=1_500_000) as server, client_of(server) as client:
        adapter = client.add_lora(rank=4, seed=1)
        pending = [adapter.forward_backward(DATA).id for _ in range(8)]
        answers: list[httpx.Response | Exception] = []
        streaming = threading.Event()
        ended: list[str] = []

        def poll() -> None:
            try:
                answers.append(httpx.get(f"{server.url}/v1/futures/{pending[-1]}?wait_s=60", timeout=90))
            except httpx.HTTPError as exc:
                answers.append(exc)

        def stream() -> None:
            with httpx.stream("GET", f"{server.url}/v1/events?after=0", timeout=90) as response:
                for line in response.iter_lines():
                    ended.append(line)
                    streaming.set()

        clients = in_threads(*[poll] * 5, stream)
        assert streaming.wait(PATIENCE_S)
        time.sleep(0.3)  # until the long polls have arrived
        executor = children(server.pid)
        assert executor
        began = time.monotonic()
        server.terminate()
        assert server.wait(PATIENCE_S) == 0, server.log_tail()
        assert time.monotonic() - began < AT_ONCE_S, "it waited for those who wait for it"
        for thread in clients:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        # Whoever waited was told how things stand, not cut off.
        assert [a.json()["state"] for a in answers if isinstance(a, httpx.Response)] == ["pending"] * 5
        assert any(line.startswith("event: forward_backward.requested") for line in ended)
        eventually(lambda: not any(map(alive, executor)))


def test_killed_server_leaves_no_executor(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server:
        executor = children(server.pid)
        assert executor
        server.kill()
        eventually(lambda: not any(map(alive, executor)))


def test_sigterm_while_starting(tmp_path: Path) -> None:
    server = fake_server(tmp_path)
    server.spawn()
    try:
        eventually(lambda: server.log_file.exists() and "starting the executor" in server.log_file.read_text())
        server.terminate()
        assert server.wait(PATIENCE_S) in (0, 143)
    finally:
        server.kill()


def test_refuses_an_old_schema(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["db", "upgrade", "--data-dir", str(tmp_path)]) == 0
    with closing(sqlite3.connect(tmp_path / "tinkerbell.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'older'")
    server = fake_server(tmp_path)
    assert failure_of(server) == 1
    assert f"tinkerbell db upgrade --data-dir {tmp_path}" in server.log_tail()


def test_executor_that_cannot_start(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, ["--executor", "fake", "--executor-option", "no_such_setting=1"])
    assert failure_of(server) == 1
    assert "no_such_setting" in server.log_tail()
    assert "Traceback" not in server.log_tail()


def test_unknown_executor(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, ["--executor", "abacus"])
    assert failure_of(server) == 1
    assert "abacus" in server.log_tail()


def test_port_that_is_taken(tmp_path: Path) -> None:
    with fake_server(tmp_path / "one") as server:
        port = str(httpx.URL(server.url).port)
        other = fake_server(tmp_path / "two", "--port", port)
        assert failure_of(other) == 1
        assert port in other.log_tail()


def test_beyond_loopback_needs_a_key(tmp_path: Path) -> None:
    # 192.0.2.1 is nobody's (RFC 5737): even if it were tried, nothing could be reached there.
    server = fake_server(tmp_path, "--host", "192.0.2.1")
    assert failure_of(server) == 2
    assert "tinkerbell keys create" in server.log_tail()


def test_a_key_closes_the_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "create", "alice", "--data-dir", str(tmp_path)]) == 0
    key = capsys.readouterr().out.strip()
    with fake_server(tmp_path) as server:
        with client_of(server) as nobody, pytest.raises(Unauthorized):
            nobody.adapters()
        with client_of(server, key) as alice:
            alice.add_lora(rank=4, seed=1)
            assert len(alice.adapters()) == 1
            assert run(["keys", "revoke", key.split("-")[1], "--data-dir", str(tmp_path)]) == 0
            eventually(lambda: refused(alice.adapters))


def test_top_needs_an_admin_for_everybodys_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_dir = ["--data-dir", str(tmp_path)]
    assert run(["keys", "create", "alice", *data_dir]) == 0
    alice = capsys.readouterr().out.strip()
    assert run(["keys", "create", "root", "--admin", *data_dir]) == 0
    admin = capsys.readouterr().out.strip()
    with fake_server(tmp_path) as server:
        with client_of(server, alice) as client:
            client.add_lora(rank=4, seed=1).forward_backward(DATA).result(timeout=PATIENCE_S)
        top = ["top", "--once", "--json", "--url", server.url, "--api-key"]
        assert run([*top, admin]) == 0
        tenants = {row["tenant"]: row for row in json.loads(capsys.readouterr().out)["tenants"]}
        assert set(tenants) == {"alice", "root"}
        assert tenants["alice"]["recent_cost_us"] > 0
        assert run([*top, alice]) == 1
        assert "admin" in capsys.readouterr().err
        assert run([*top, alice, "--mine"]) == 0
        assert [row["tenant"] for row in json.loads(capsys.readouterr().out)["tenants"]] == ["alice"]
        assert run(["top", "--once", "--url", server.url, "--api-key", admin]) == 0
        assert "alice" in capsys.readouterr().out


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except Unauthorized:
        return True
    return False


def failure_of(server: ServerProcess) -> int | None:
    """Exit status of a server that does not come up."""
    with pytest.raises(ServerError):
        server.start()
    return server.returncode


def in_threads(*targets: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    return threads


def children(pid: int) -> list[int]:
    """Child processes, from /proc."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and ") Z " not in stat.read_text()
