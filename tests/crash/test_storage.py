"""The database goes away, the disk is full, and what is acknowledged was synced before."""

import contextlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.crash import history, lives, workload
from tests.crash.history import History
from tests.crash.lives import FAKE, NUM_STEPS, Counted, MakeSettings, Schedule
from tests.support.server import client_of, fake_server
from tests.support.waiting import PATIENCE_S, eventually
from tinkerbell.cli.bench.postgres import ScratchPostgres, find_binaries, scratch_postgres
from tinkerbell.config import Settings
from tinkerbell.events import schema
from tinkerbell.events.store import EventStore
from tinkerbell.sdk import Client, Datum

pytestmark = pytest.mark.crash


def large_data() -> list[dict[str, Any]]:
    """Of a request that does not fit into a row: noise, which no compressor makes much smaller."""
    noise = random.Random(1)
    tokens = [[noise.randrange(3, 250) for _ in range(900)] for _ in range(40)]
    weights = [[noise.random() for _ in range(900)] for _ in range(40)]
    rows = zip(tokens, weights, strict=True)
    return [{"tokens": row, "targets": row, "loss_inputs": {"weights": weight}} for row, weight in rows]


# ---- Postgres --------------------------------------------------------------------------------------------------------


@pytest.fixture
def durable_postgres() -> Iterator[ScratchPostgres]:
    """One that syncs, so that it may die."""
    with scratch_postgres(durable=True) as server:
        yield server


def restart_at_once(server: ScratchPostgres) -> None:
    """As after a crash: every process of it is killed, and it recovers from its own log."""
    data = server.directory / "data"
    owner = data.stat()
    other = os.geteuid() == 0
    identity: dict[str, Any] = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if other else {}
    command = [str(find_binaries() / "pg_ctl"), f"--pgdata={data}", "--wait", f"--log={server.directory / 'log'}"]
    command += ["--mode=immediate", "restart"]
    subprocess.run(command, cwd=server.directory, check=True, stdout=subprocess.DEVNULL, **identity)


@pytest.mark.postgres
def test_postgres_restarts_under_load(
    durable_postgres: ScratchPostgres, make_sqlite: MakeSettings, counted: Counted
) -> None:
    """Three times while clients work; the server stays up and they only wait."""
    schema.upgrade(durable_postgres.url())
    settings = msgspec.structs.replace(make_sqlite(), database_url=durable_postgres.url())
    server = lives.Lives(settings, Schedule(0, (), 0.0), (*FAKE, "--executor-option", "latency_us=20000"))
    seen, num_restarts, done = History(), 0, threading.Event()

    def disturb() -> None:
        nonlocal num_restarts
        # Not before there is something to disturb.
        eventually(lambda: len(seen.answers) > 3)
        while not done.is_set() and num_restarts < 3:
            restart_at_once(durable_postgres)
            num_restarts += 1
            done.wait(1.0)

    disturber = threading.Thread(target=disturb)
    server.start()
    disturber.start()
    try:
        answers = workload.run(server.url, seen, loss=0.0, seed=1, num_steps=NUM_STEPS)
    finally:
        done.set()
        disturber.join()
        server.stop()
    store = EventStore.open(settings)
    store.check()
    history.check(seen, store, settings, server.log)
    store.close()
    assert num_restarts > 0
    assert server.num_lives == 1, server.log()
    assert answers == counted[1]


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Eight megabytes."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_full_disk_refuses_and_loses_nothing(small_disk: Path, counted: Counted) -> None:
    """Clients get a 503 that says so and are served as soon as there is room, the same as if there had always been."""
    settings = Settings(data_dir=str(small_disk / "data"), executor="fake")
    Path(settings.data_dir).mkdir()
    schema.upgrade(settings.url)
    server = lives.Lives(settings, Schedule(0, (), 0.0), (*FAKE, "--executor-option", "latency_us=20000"))
    seen = History()
    refused: list[httpx.Response] = []
    ballast = small_disk / "ballast"

    def fill() -> None:
        eventually(lambda: len(seen.answers) > 3)
        with httpx.Client(base_url=server.url, timeout=30) as probe:
            adapter = probe.post("/v1/adapters", json={"lora": {"rank": 1}}).json()["adapter_id"]
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            try:
                deadline = time.monotonic() + PATIENCE_S
                while time.monotonic() < deadline and len(refused) < 10:
                    small = probe.post("/v1/adapters", json={"lora": {"rank": 1}})
                    large = probe.post(f"/v1/adapters/{adapter}/fwdbwd", json={"data": large_data()})
                    refused.extend(answer for answer in (small, large) if not answer.is_success)
            finally:
                ballast.unlink()

    filler = threading.Thread(target=fill)
    server.start()
    filler.start()
    try:
        answers = workload.run(server.url, seen, loss=0.0, seed=1, num_steps=NUM_STEPS)
    finally:
        filler.join()
        server.stop()
    assert refused, f"the disk was never full: {server.log()[-3000:]}"
    for answer in refused:
        assert answer.status_code == 503, answer.text
        assert answer.headers["content-type"].startswith("application/problem+json")
        assert float(answer.headers["retry-after"]) > 0
    assert {answer.request.url.path.rpartition("/")[2] for answer in refused} == {"adapters", "fwdbwd"}
    assert server.num_lives == 1, server.log()
    store = EventStore.open(settings)
    store.check()
    assert not store.queries.pending()
    store.close()
    assert answers == counted[1]


# ---- power -----------------------------------------------------------------------------------------------------------

TRACED = "fsync,fdatasync,pwrite64,write,writev,rename,renameat,renameat2,sendto,sendmsg"


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[tuple[Path, Client]]:
    """(system calls so far, a client) of a server under strace."""
    if subprocess.run(["strace", "-V"], capture_output=True, check=False).returncode:
        raise AssertionError("this needs strace: apt-get install strace")
    calls = tmp_path / "calls"
    data_dir = tmp_path / "data"
    with fake_server(data_dir) as server:
        # Attached when it is up: only what a request causes is wanted.
        command = ["strace", "-f", "-yy", "-s", "64", "-e", f"trace={TRACED}", "-o", str(calls), "-p", str(server.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
            assert tracer.stderr is not None
            tracer.stderr.readline()
            with client_of(server) as client:
                yield calls, client
            tracer.terminate()


def acknowledged(calls: Path) -> list[list[tuple[str, str]]]:
    """For each request that was accepted, in order: the (system call, arguments) that ended after the answer before and
    before the acknowledgement was sent."""
    unfinished: dict[str, str] = {}
    found: list[list[tuple[str, str]]] = []
    since: list[tuple[str, str]] = []
    for line in calls.read_text(errors="replace").splitlines():
        pid, _, call = line.partition(" ")
        call = call.strip()
        if "HTTP/1.1 2" in call and "resumed>" not in call:
            if "HTTP/1.1 202" in call:
                found.append(since)
            since = []
        if call.endswith("<unfinished ...>"):
            unfinished[pid] = call.removesuffix("<unfinished ...>")
            continue
        if call.startswith("<..."):
            call = unfinished.pop(pid, "") + call.partition("resumed>")[2]
        name, _, arguments = call.partition("(")
        since.append((name, arguments))
    return found


def places(found: list[tuple[str, str]], names: tuple[str, ...], text: str) -> list[int]:
    """Where calls of these names with this text in their arguments stand."""
    return [index for index, (name, arguments) in enumerate(found) if name in names and text in arguments]


def test_what_is_acknowledged_was_synced(traced: tuple[Path, Client]) -> None:
    """SQLite's log between the request's arrival and its answer; a blob's bytes, and the names on the way to it, before
    the event that names it."""
    calls, client = traced
    adapter = client.add_lora(rank=2, seed=1)
    adapter.forward_backward([Datum(**datum) for datum in large_data()]).result(60)
    time.sleep(0.5)

    small, large = acknowledged(calls)
    written = places(small, ("pwrite64", "write"), "tinkerbell.db-wal")
    synced = places(small, ("fsync", "fdatasync"), "tinkerbell.db-wal")
    assert written and synced, "the request left nothing in SQLite's log"
    assert synced[-1] > written[0], "written, and not synced before the answer"

    blob = places(large, ("fsync", "fdatasync"), "/blobs/")
    renamed = places(large, ("rename", "renameat", "renameat2"), "tmp-")
    committed = places(large, ("fsync", "fdatasync"), "tinkerbell.db-wal")
    assert renamed, "no blob was written"
    bytes_synced = [index for index in blob if "tmp-" in large[index][1] and index < renamed[0]]
    names_synced = [index for index in blob if index > renamed[0] and index < committed[-1]]
    assert bytes_synced, "the blob got its name before its bytes were durable"
    assert len(names_synced) >= 2, "the directories on the way to the blob were not synced before the event"
