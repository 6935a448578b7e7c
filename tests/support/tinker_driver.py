"""Calls of the tinker protocol, answered by hand."""

import struct
from typing import Any

import httpx

from tests.support.api_driver import ApiDriver, answer
from tinkerbell.api.tinker import wire_pb2 as pb
from tinkerbell.events import kinds

OWNER, STRANGER = "owner", "stranger"
LORA = {"rank": 4, "seed": 1, "train_unembed": False, "train_mlp": True, "train_attn": True}


class Tinker:
    """Calls the protocol as a tenant; requests are answered by hand."""

    def __init__(self, api: ApiDriver, tenant: str = OWNER) -> None:
        self.api, self.tenant = api, tenant

    def call(self, method: str, route: str, **kwargs: Any) -> httpx.Response:
        headers = {"X-API-Key": f"tml-{self.api.key(self.tenant)}", **kwargs.pop("headers", {})}
        return self.api.call(method, f"/api/v1/{route}", headers=headers, **kwargs)

    def post(self, route: str, **body: Any) -> httpx.Response:
        return self.call("POST", route, json=body)

    def ok(self, route: str, **body: Any) -> dict[str, Any]:
        found = self.post(route, **body)
        assert found.status_code == 200, found.text
        decoded: dict[str, Any] = found.json()
        return decoded

    def session(self) -> str:
        session: str = self.ok("create_session", sdk_version="0.38.0", tags=[])["session_id"]
        return session

    def model(self, session: str | None = None, number: int = 0, **changes: Any) -> str:
        """A ready one."""
        body = {"model_seq_id": number, "base_model": "tiny", "lora_config": LORA, **changes}
        made = self.ok("create_model", session_id=session or self.session(), **body)
        answer(self.api.store, int(made["request_id"]))
        model: str = made["model_id"]
        return model

    def forward_backward(self, model: str, seq: int, *, tokens: int = 3, **changes: Any) -> httpx.Response:
        request = message(model, seq, tokens=tokens, **changes)
        headers = {"Content-Type": "application/x-protobuf"}
        return self.call("POST", "forward_backward", content=request.SerializeToString(), headers=headers)

    def saved(self, model: str, seq: int, name: str = "step-1", route: str = "save_weights", **more: Any) -> str:
        """Path of a checkpoint."""
        request_id = self.ok(route, model_id=model, seq_id=seq, path=name, **more)["request_id"]
        event = self.api.store.get(int(request_id))
        assert event is not None and isinstance(event.event, kinds.SaveRequested)
        answer(self.api.store, int(request_id))
        path: str = self.ok("retrieve_future", request_id=request_id)["path"]
        return path


def message(model: str, seq: int, *, tokens: int = 3, loss: str = "cross_entropy", **inputs: Any) -> Any:
    request = pb.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn=loss)
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = struct.pack(f"<{tokens}i", *range(1, tokens + 1))
    targets = struct.pack(f"<{tokens}q", *range(2, tokens + 2))
    datum.loss_fn_inputs["target_tokens"].CopyFrom(pb.Tensor(dense=targets, dtype=pb.DTYPE_INT64, shape=[tokens]))
    for name, value in inputs.items():
        datum.loss_fn_inputs[name].CopyFrom(value)
    return request


def dense(values: list[float], shape: list[int], dtype: Any = pb.DTYPE_FLOAT32) -> Any:
    form = {pb.DTYPE_FLOAT32: "f", pb.DTYPE_INT64: "q"}[dtype]
    return pb.Tensor(dense=struct.pack(f"<{len(values)}{form}", *values), dtype=dtype, shape=shape)


def csr(values: list[float], rows: list[int], columns: list[int], shape: list[int]) -> Any:
    found = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=shape)
    found.sparse_csr.values = struct.pack(f"<{len(values)}f", *values)
    found.sparse_csr.crow_indices = struct.pack(f"<{len(rows)}q", *rows)
    found.sparse_csr.col_indices = struct.pack(f"<{len(columns)}q", *columns)
    return found
