"""Data of a real server is erased by the commands: clients, auditors and replay are told what is not there any more."""

import json
from pathlib import Path

import pytest

from tests.support.server import client_of, fake_server
from tinkerbell.cli.main import run
from tinkerbell.errors import Erased, Gone
from tinkerbell.sdk import Client, Datum

DATA = [Datum(tokens=list(range(1, 12)), targets=list(range(2, 13)))]


def trained(client: Client, steps: int = 3) -> tuple[str, list[int], str]:
    """(adapter, futures, checkpoint) of a short run."""
    adapter = client.add_lora(rank=2)
    futures = []
    for _ in range(steps):
        futures += [adapter.forward_backward(DATA).id, adapter.optim_step(learning_rate=0.05).id]
    return adapter.id, futures, adapter.save().result(timeout=30).checkpoint_id


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
