"""Logs of the last release that took what it could not give back: this one comes up on them, the requests that poisoned
them fail, and everybody else goes on. How they were made: tests/golden/poisoned/make.py."""

import io
import json
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard

from tests.support.server import client_of, fake_server
from tinkerbell.cli.main import run
from tinkerbell.sdk import Client, Datum
from tinkerbell.sdk.errors import RequestFailed

POISONED = Path(__file__).parent.parent / "golden" / "poisoned"
DATA = [Datum(tokens=[1, 2, 3], targets=[2, 3, 4])]


def unpacked(name: str, directory: Path) -> Path:
    packed = zstandard.decompress((POISONED / f"{name}.tar.zst").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(directory, filter="data")
    (directory / "encryption.key").chmod(0o600)
    return directory


def command(capsys: pytest.CaptureFixture[str], data_dir: Path, *arguments: str) -> Any:
    capsys.readouterr()
    assert run([*arguments, "--json", "--data-dir", str(data_dir)]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def waiting(data_dir: Path) -> dict[str, list[int]]:
    """Tenant -> requests without an answer."""
    found: dict[str, list[int]] = {}
    with closing(sqlite3.connect(data_dir / "tinkerbell.db")) as connection:
        for tenant, position in connection.execute("SELECT tenant, id FROM futures WHERE state = 'pending'"):
            found.setdefault(tenant, []).append(position)
    return found


def outcomes(client: Client, positions: list[int]) -> dict[int, str]:
    """Position -> `completed`, or the code of its failure."""
    found = {}
    for position in positions:
        try:
            client.future(position).result(timeout=60)
            found[position] = "completed"
        except RequestFailed as exc:
            found[position] = exc.code
    return found


@pytest.mark.parametrize(
    ("name", "failed", "num_unreadable"),
    [("stops", {"corrupt"}, 7), ("sums", {"non-finite"}, 0)],
)
def test_a_poisoned_log_recovers_by_starting_this_release(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    failed: set[str],
    num_unreadable: int,
) -> None:
    data_dir = unpacked(name, tmp_path)
    command(capsys, data_dir, "db", "upgrade")
    before = command(capsys, data_dir, "db", "check")
    assert len(before["unreadable"]) == num_unreadable and before["num_pending"] > 0
    unreadable = [each["position"] for each in before["unreadable"]]
    asked = waiting(data_dir)
    keys = json.loads((data_dir / "keys.json").read_text())
    with (
        fake_server(data_dir, "--config", str(data_dir / "tinkerbell.toml")) as server,
        client_of(server, keys["bob"]) as bob,
        client_of(server, keys["alice"]) as alice,
    ):
        assert set(outcomes(bob, asked["bob"]).values()) == {"completed"}
        found = outcomes(alice, asked["alice"])
        assert set(found.values()) == {"completed"} | failed
        assert [position for position, end in found.items() if end == "corrupt"] == unreadable
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        for position in unreadable:
            # The protocol that they came in by, too: an answer, not an error that is asked for again.
            body = {"request_id": str(position)}
            headers = {"X-API-Key": f"tml-{keys['alice']}"}
            answer = httpx.post(f"{server.url}/api/v1/retrieve_future", json=body, headers=headers)
            assert answer.status_code == 200 and answer.json()["category"] == "server"
        for client in (alice, bob):
            adapter = client.add_lora(rank=2)
            adapter.forward_backward(DATA)
            adapter.optim_step().result(timeout=60)
        for row in alice.adapters():
            alice.adapter(row.id).remove().result(timeout=60)
    for check in (("audit", "verify"), ("db", "check")):
        report = command(capsys, data_dir, *check)
        assert report["ok"] and report["num_pending"] == 0
        assert [(each["position"], each["what"]) for each in report["unreadable"]] == [(p, "event") for p in unreadable]
    assert command(capsys, data_dir, "db", "compact", "--older-than", "0h", "--yes")["removed"]
    assert command(capsys, data_dir, "tenants", "erase", "alice", "--yes")["bulk"]
    assert command(capsys, data_dir, "audit", "verify")["num_removed"] > 0
