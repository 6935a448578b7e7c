"""A server whose executor lives and does nothing: noticed, replaced, and the guilty request alone fails."""

from pathlib import Path

import httpx
import pytest

from tests.support import hanging
from tests.support.server import client_of, eventually
from tinkerbell.cli.process import ServerProcess
from tinkerbell.sdk import Datum
from tinkerbell.sdk.errors import RequestFailed

TOKEN = 13
PATIENCE_S = 120.0


def test_a_request_that_hangs_fails_and_its_neighbours_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    hanging.install(site, monkeypatch)
    extra = {"where": "run", "how": "deadlocks", "token": str(TOKEN)}
    options = [f"--executor-option={name}={value}" for name, value in extra.items()]
    silence = {"TINKERBELL_EXECUTOR_SILENCE_S": "3"}
    server = ServerProcess(tmp_path / "data", ["--executor", hanging.KIND, *options], environment=silence)
    with server, client_of(server) as client:

        def ready() -> httpx.Response:
            return httpx.get(f"{server.url}/readyz")

        guilty, neighbour = client.add_lora(rank=2, seed=1), client.add_lora(rank=2, seed=2)
        hung = guilty.forward_backward([Datum(tokens=[TOKEN, 1], targets=[1, 2])])
        beside = neighbour.forward_backward([Datum(tokens=[1, 2], targets=[2, 3])])
        eventually(lambda: ready().status_code == 503, PATIENCE_S)
        assert httpx.get(f"{server.url}/healthz").json()["status"] == "ok"
        with pytest.raises(RequestFailed, match="died 3 times") as caught:
            hung.result(timeout=PATIENCE_S)
        assert caught.value.code == "poison"
        assert beside.result(timeout=PATIENCE_S).loss > 0
        assert neighbour.optim_step().result(timeout=PATIENCE_S).step == 1
        eventually(lambda: ready().status_code == 200, PATIENCE_S)
    log = server.log_file.read_text()
    assert "made no progress in `run`" in log
    assert f"poison request={hung.id}" in log
    assert f"requests=[{hung.id}]" in log
