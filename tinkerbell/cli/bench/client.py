"""A small blocking HTTP client on one kept-alive connection, cheap enough to leave the cores to the server.

The SDK is not used: a benchmark of the server should not measure its client.
"""

import http.client
import json
import time
from typing import Any
from urllib.parse import urlsplit

import msgspec

from tinkerbell.errors import ServerError
from tinkerbell.types import LoraConfig

WAIT_S = 30.0
SMALL = LoraConfig(rank=4)
IDLE_S = 2.0
"""A connection that rested longer is opened anew: servers close idle ones after 5 s."""


class RawClient:
    """One connection of one tenant. Not thread-safe."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=2 * WAIT_S)
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._used_at = time.monotonic()

    def call(self, method: str, path: str, body: bytes | None = None) -> Any:
        """The decoded answer. Raises ServerError on any status from 400 on."""
        if time.monotonic() - self._used_at > IDLE_S:
            self._connection.close()
        self._connection.request(method, path, body, self._headers)
        response = self._connection.getresponse()
        answer = response.read()
        self._used_at = time.monotonic()
        if response.status >= 400:
            raise ServerError(f"{method} {path}: {response.status} {answer[:500].decode(errors='replace')}")
        return json.loads(answer)

    def post(self, path: str, body: bytes) -> int:
        """Id of the future of a request."""
        future_id = self.call("POST", path, body)["id"]
        assert isinstance(future_id, int)
        return future_id

    def result(self, future_id: int) -> dict[str, Any]:
        """The future once it is answered. Raises ServerError if it failed."""
        while True:
            future: dict[str, Any] = self.call("GET", f"/v1/futures/{future_id}?wait_s={WAIT_S:g}")
            if future["state"] == "failed":
                raise ServerError(f"request {future_id} failed: {future['error']}")
            if future["state"] == "completed":
                return future

    def add_lora(self, seed: int, lora: LoraConfig = SMALL) -> str:
        """Id of a fresh adapter, ready for work."""
        future_id = self.post("/v1/adapters", msgspec.json.encode({"lora": lora, "seed": seed}))
        adapter = self.result(future_id)["adapter_id"]
        assert isinstance(adapter, str)
        return adapter

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def training_body(num_tokens: int, datum_tokens: int) -> bytes:
    """A fwdbwd body of `num_tokens` in datums of `datum_tokens` (the last may be shorter)."""
    data = []
    for start in range(0, num_tokens, datum_tokens):
        tokens = [1 + (start + i) % 61 for i in range(min(datum_tokens, num_tokens - start))]
        data.append({"tokens": tokens, "targets": [*tokens[1:], 1]})
    return json.dumps({"data": data}).encode()
