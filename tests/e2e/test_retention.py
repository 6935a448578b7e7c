"""Data of a real server is erased by the commands: clients, auditors and replay are told what is not there any more."""

import json
import shutil
from pathlib import Path

import httpx
import pytest

from tests.support.server import client_of, fake_server
from tests.support.waiting import PATIENCE_S
from tinkerbell.cli.main import run
from tinkerbell.errors import Compacted, Erased, Gone
from tinkerbell.sdk import Client, Datum

DATA = [Datum(tokens=list(range(1, 12)), targets=list(range(2, 13)))]


def trained(client: Client, steps: int = 3) -> tuple[str, list[int], str]:
    """(adapter, futures, checkpoint) of a short run."""
    adapter = client.add_lora(rank=2)
    futures = []
    for _ in range(steps):
        futures += [adapter.forward_backward(DATA).id, adapter.optim_step(learning_rate=0.05).id]
    return adapter.id, futures, adapter.save().result(timeout=PATIENCE_S).checkpoint_id


def command(capsys: pytest.CaptureFixture[str], data_dir: Path, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        status = run([*arguments, "--data-dir", str(data_dir)])
    except SystemExit as exc:
        status = int(exc.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_an_erased_tenant_and_the_server_after_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_dir = tmp_path / "data"
    with fake_server(data_dir) as server, client_of(server) as client:
        adapter, futures, checkpoint = trained(client)
        status, _, err = command(capsys, data_dir, "tenants", "erase", "local", "--yes")
        assert status == 1 and "stop it first" in err
        client.download_checkpoint(checkpoint, tmp_path / "before.tar")
    _, seal, _ = command(capsys, data_dir, "audit", "seal")
    status, out, err = command(capsys, data_dir, "tenants", "erase", "local", "--yes", "--json")
    assert status == 0, err
    done = json.loads(out)
    assert (done["num_adapters"], done["num_keys_destroyed"]) == (1, 1) and done["bulk"]["num_bodies"] == 6
    assert [path for path in (data_dir / "blobs").rglob("*") if path.is_file()] == []
    assert command(capsys, data_dir, "audit", "verify", "--seal", seal.strip())[0] == 0
    status, _, err = command(capsys, data_dir, "replay", "verify", adapter)
    assert status == 2 and "have lost their bodies or blobs" in err and "erased" in err
    assert command(capsys, data_dir, "tenants", "erase", "nobody", "--yes")[0] == 1
    with fake_server(data_dir) as server, client_of(server) as client:
        with pytest.raises(Erased, match="local"):
            client.future(futures[0]).result(timeout=5)
        with pytest.raises(Gone):
            client.download_checkpoint(checkpoint, tmp_path / "after.tar")
        assert client.adapter(adapter).info().state == "removed"
        trained(client)
    assert command(capsys, data_dir, "audit", "verify")[0] == 0


def test_a_compacted_log_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A killed server's adapters come back to the same bits with all the bulk or with only what is needed."""
    data_dir, whole = tmp_path / "data", tmp_path / "whole"
    often = {"TINKERBELL_CHECKPOINT_EVERY_STEPS": "4"}
    with fake_server(data_dir, latency_us=200_000, environment=often) as server, client_of(server) as client:
        adapter, futures, checkpoint = trained(client, steps=10)
        copy = client.add_lora(checkpoint=checkpoint).id
        status, out, _ = command(capsys, data_dir, "db", "compact", "--older-than", "0h", "--dry-run", "--json")
        assert status == 0 and json.loads(out)["tenants"]["local"]["num_bodies"] > 0 and not json.loads(out)["removed"]
        status, _, err = command(capsys, data_dir, "db", "compact", "--older-than", "0h", "--yes")
        assert status == 1 and "stop it first" in err
        train = client.adapter(adapter)
        # One is done, two are not.
        train.forward_backward(DATA).result(timeout=PATIENCE_S)
        pending = [train.forward_backward(DATA).id for _ in range(2)]
        server.kill()
    shutil.copytree(data_dir, whole)
    status, out, err = command(capsys, data_dir, "db", "compact", "--older-than", "0h", "--yes", "--json")
    assert status == 0, err
    bulk = json.loads(out)["tenants"]["local"]
    assert bulk["num_bodies"] >= 15 and bulk["num_blobs"] >= 2 and json.loads(out)["num_files"] >= 2
    assert command(capsys, data_dir, "audit", "verify")[0] == 0
    status, out, _ = command(capsys, data_dir, "db", "compact", "--older-than", "0h", "--yes", "--json")
    assert status == 0 and json.loads(out)["tenants"]["local"] == dict.fromkeys(bulk, 0), "there is nothing left"
    status, _, err = command(capsys, data_dir, "replay", "verify", adapter)
    assert status == 2 and "have lost their bodies or blobs" in err
    digests = []
    for directory in (whole, data_dir):
        with fake_server(directory, environment=often) as server, client_of(server) as client:
            losses = [client.future(future).result(timeout=PATIENCE_S).loss for future in pending]
            client.adapter(copy).forward_backward(DATA)
            steps = [client.adapter(each).optim_step(learning_rate=0.1) for each in (adapter, copy)]
            digests.append((losses, [step.result(timeout=PATIENCE_S).state_digest for step in steps]))
            if directory == data_dir:
                with pytest.raises(Compacted, match="db compact"):
                    client.future(futures[0]).result(timeout=5)
                client.download_checkpoint(checkpoint, tmp_path / "saved.tar")
        assert command(capsys, directory, "audit", "verify")[0] == 0
    assert digests[0] == digests[1]


def test_who_began_with_a_copy_needs_nothing_of_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_dir, exported = tmp_path / "data", tmp_path / "run.tbrun"
    with fake_server(data_dir) as server, client_of(server) as client:
        adapter, _, checkpoint = trained(client)
        path = f"weights/{checkpoint}"
        with httpx.Client(base_url=f"{server.url}/api/v1/", headers={"X-API-Key": "tml-x"}) as tinker:
            asked = {"source_path": f"tinker://{adapter}/{path}", "destination_project_id": "default"}
            made = tinker.post("copy_weights", json=asked).raise_for_status().json()["tinker_path"]
            tinker.delete(f"training_runs/{adapter}/checkpoints/{path}").raise_for_status()
        (copy,) = [row for row in client.checkpoints() if made == f"tinker://{row.adapter_id}/{path}"]
        client.adapter(adapter).remove().result(timeout=PATIENCE_S)
    status, _, err = command(capsys, data_dir, "db", "compact", "--older-than", "0h", "--yes")
    assert status == 0, err
    with fake_server(data_dir) as server, client_of(server) as client:
        began = client.add_lora(checkpoint=copy.id, with_optimizer=True)
        began.forward_backward(DATA)
        assert began.optim_step(learning_rate=0.05).result(timeout=PATIENCE_S).step == 4
    assert command(capsys, data_dir, "audit", "verify")[0] == 0
    assert command(capsys, data_dir, "replay", "verify", began.id)[0] == 0
    assert command(capsys, data_dir, "replay", "export", began.id, "--out", str(exported))[0] == 0
    assert command(capsys, data_dir, "replay", "verify", str(exported))[0] == 0
    status, _, err = command(capsys, data_dir, "replay", "verify", copy.adapter_id)
    assert status == 2 and f"copy of the checkpoint {checkpoint}" in err


def test_ages_and_tenants_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_dir = tmp_path / "data"
    with fake_server(data_dir) as server, client_of(server) as client:
        trained(client)
    for age in ("30", "1y", "-1d", "1.5d", "99999d", "\uff19d"):
        status, _, err = command(capsys, data_dir, "db", "compact", "--older-than", age)
        assert status == 2 and "30d" in err, age
    status, _, err = command(capsys, data_dir, "db", "compact", "--older-than", "1d", "--tenant", "nobody")
    assert status == 1 and "nobody" in err
    status, out, _ = command(capsys, data_dir, "db", "compact", "--older-than", "9999w", "--dry-run")
    assert status == 0
    status, out, _ = command(capsys, data_dir, "db", "compact", "--older-than", "1d", "--yes", "--json")
    assert status == 0 and json.loads(out)["tenants"]["local"]["num_bytes"] == 0, "all of it is younger"
