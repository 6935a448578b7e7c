"""A program that vanishes: its session ends on a real server, and its place is free again."""

from pathlib import Path
from typing import Any

import httpx

from tests.support.server import fake_server
from tests.support.waiting import eventually

LORA = {"rank": 4, "seed": 1, "train_unembed": False, "train_mlp": True, "train_attn": True}


class Program:
    """Speaks the tinker protocol, as long as it is asked to."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/api/v1"
        self.session = self.ok("create_session", sdk_version="0.38.0", tags=[])["session_id"]

    def post(self, route: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/{route}", json=body, headers={"X-API-Key": "tml-anything"}, timeout=45)

    def ok(self, route: str, **body: Any) -> dict[str, Any]:
        found = self.post(route, **body)
        assert found.status_code == 200, found.text
        decoded: dict[str, Any] = found.json()
        return decoded

    def result(self, route: str, **body: Any) -> dict[str, Any]:
        request_id = self.ok(route, **body)["request_id"]
        return self.ok("retrieve_future", request_id=request_id, allow_metadata_only=False)

    def create(self, number: int) -> httpx.Response:
        body = {"model_seq_id": number, "base_model": "fake", "lora_config": LORA}
        return self.post("create_model", session_id=self.session, **body)

    def is_heard(self) -> bool:
        return self.post("session_heartbeat", session_id=self.session).status_code == 200


def test_the_adapter_of_a_program_that_vanished_makes_room(tmp_path: Path) -> None:
    config = tmp_path / "tinkerbell.toml"
    config.write_text("session_expiry_s = 6.0\nidle_adapter_s = 3600.0\n[limits]\nmax_adapters = 1\n")
    with fake_server(tmp_path / "data", "--config", str(config)) as server:
        vanishes, stays = Program(server.url), Program(server.url)
        assert vanishes.create(0).status_code == 200
        path = vanishes.result("save_weights", model_id=f"{vanishes.session}:train:0", seq_id=1, path="mine")["path"]
        refused = stays.create(0)
        assert refused.status_code == 413 and "1 of 1 adapters" in refused.text

        def has_room() -> bool:
            assert stays.is_heard()
            return stays.create(0).status_code == 200

        eventually(has_room)
        assert not vanishes.is_heard()
        loaded = stays.result("load_weights", model_id=f"{stays.session}:train:0", seq_id=1, path=path, optimizer=True)
        assert "error" not in loaded, loaded
