"""What a forward_backward and other bodies of the tinker protocol may hold."""

import struct
from typing import Any

import pytest

from tests.support.api_driver import answer
from tests.support.tinker_driver import Tinker, csr, dense
from tinkerbell.api.tinker import wire_pb2 as pb
from tinkerbell.events import kinds


@pytest.mark.parametrize(
    ("weights", "detail"),
    [
        (dense([1.0, 2.0], [2]), "weights has the shape [2]; for 3 tokens it is [3]"),
        (dense([1.0, 2.0], [3]), "2 numbers for the shape [3]"),
        (dense([1.0, float("nan"), 1.0], [3]), "weights[1] is nan"),
        (pb.Tensor(dense=b"12345", dtype=pb.DTYPE_FLOAT32, shape=[3]), "no whole numbers"),
        (pb.Tensor(dense=b"", dtype=pb.DTYPE_BFLOAT16, shape=[3]), "dtype"),
        (pb.Tensor(dense=b"", dtype=pb.DTYPE_FLOAT32, shape=[-3]), "shape [-3]"),
        (pb.Tensor(dense=b"", dtype=pb.DTYPE_FLOAT32, shape=[2**40]), "shape"),
        (csr([1.0], [0, 1, 1, 1], [5], [3, 1]), "no CSR"),
        (csr([1.0], [0, 2, 1, 1], [0], [3, 1]), "no CSR"),
        (csr([1.0], [0, 1], [0], [3, 1]), "no CSR"),
        (csr([], [], [], [3, 1]), "no CSR"),
        (dense([1.0] * 6, [3, 2]), "weights has the shape [3, 2]; for 3 tokens it is [3]"),
    ],
)
def test_bad_tensors_are_named(tinker: Tinker, weights: Any, detail: str) -> None:
    found = tinker.forward_backward(tinker.model(), 1, weights=weights)
    assert found.status_code == 400 and detail in found.json()["detail"], found.text


def test_a_column_may_be_sparse(tinker: Tinker) -> None:
    model = tinker.model()
    found = tinker.forward_backward(model, 1, weights=csr([0.5, 2.0], [0, 1, 1, 2], [0, 0], [3, 1]))
    assert found.status_code == 200, found.text
    event = tinker.api.store.get(int(found.json()["request_id"]))
    assert event is not None
    body = tinker.api.store.body(event)
    assert isinstance(body, kinds.ForwardBackwardBody)
    assert struct.unpack("<3f", body.data[0].loss_inputs["weights"]) == (0.5, 0.0, 2.0)


def test_a_token_may_have_several_targets(tinker: Tinker) -> None:
    """Sparse or dense; absent cells are token 0 with weight 0. The answer has the shape of the targets."""
    model = tinker.model()
    targets = csr([7.0, 8.0, 9.0], [0, 1, 1, 3], [0, 0, 1], [3, 2])
    targets.sparse_csr.values, targets.dtype = struct.pack("<3q", 7, 8, 9), pb.DTYPE_INT64
    weights = dense([1.0, 0.0, 0.0, 0.0, 0.5, 0.25], [3, 2])
    request_id = tinker.forward_backward(model, 1, target_tokens=targets, weights=weights).json()["request_id"]
    event = tinker.api.store.get(int(request_id))
    assert event is not None and isinstance(event.event, kinds.ForwardBackwardRequested)
    assert event.event.num_targets == 2
    body = tinker.api.store.body(event)
    assert isinstance(body, kinds.ForwardBackwardBody)
    assert struct.unpack("<6i", body.data[0].targets) == (7, 0, 0, 0, 8, 9)
    answer(tinker.api.store, int(request_id))
    found = tinker.call("POST", "retrieve_future", json={"request_id": request_id})
    output = pb.ForwardBackwardOutput()
    output.ParseFromString(found.content)
    logprobs = output.loss_fn_outputs[0].fields["logprobs"]
    assert list(logprobs.trailing_shape) == [2]
    assert len(logprobs.data) == 4 * 6 and struct.unpack("<2q", logprobs.offsets) == (0, 24)


@pytest.mark.parametrize(
    ("inputs", "detail"),
    [
        ({"weights": dense([1.0] * 3, [3])}, "weights has the shape [3]; for 3 tokens it is [3, 2], since data[0]"),
        (
            {"loss": "ppo", "logprobs": dense([1.0] * 6, [3, 2]), "advantages": dense([1.0] * 6, [3, 2])},
            "ppo takes one",
        ),
        ({"target_tokens": dense([1] * 3, [3, 0], pb.DTYPE_INT64)}, "K is 1 to 1024"),
        ({"target_tokens": dense([1] * 3, [3, 10**9], pb.DTYPE_INT64)}, "K is 1 to 1024"),
        ({"target_tokens": dense([1] * 3, [2, 2], pb.DTYPE_INT64)}, "target_tokens has the shape [2, 2]"),
    ],
)
def test_bad_targets_are_named(tinker: Tinker, inputs: dict[str, Any], detail: str) -> None:
    wide = {"target_tokens": dense([1] * 6, [3, 2], pb.DTYPE_INT64)}
    found = tinker.forward_backward(tinker.model(), 1, **(wide | inputs))
    assert found.status_code == 400 and detail in found.json()["detail"], found.text


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"loss": "focal"}, "focal"),
        ({"loss": "stable_reinforce"}, "Train with importance_sampling"),
        ({"loss": "ppo"}, "needs 'logprobs'"),
        ({"nothing": dense([1.0] * 3, [3])}, "reads no 'nothing'"),
        ({"tokens": 33}, "takes at most 32"),
        ({"target_tokens": dense([1, 2, 100], [3], pb.DTYPE_INT64)}, "target_tokens[2] is 100"),
        ({"target_tokens": dense([1, 2, -1], [3], pb.DTYPE_INT64)}, "target_tokens[2] is -1"),
    ],
)
def test_bad_data_is_named(tinker: Tinker, change: dict[str, Any], detail: str) -> None:
    found = tinker.forward_backward(tinker.model(), 1, **change)
    assert found.status_code == 400 and detail in found.json()["detail"], found.text


def test_other_bodies(tinker: Tinker) -> None:
    protobuf = {"Content-Type": "application/x-protobuf"}
    for headers, content, status in (
        (protobuf, b"\xff\xff", 400),
        ({"Content-Type": "application/json"}, b"{}", 415),
        ({**protobuf, "Content-Encoding": "zstd"}, b"no zstd", 400),
        ({**protobuf, "Content-Encoding": "br"}, b"", 415),
    ):
        found = tinker.call("POST", "forward_backward", content=content, headers=headers)
        assert found.status_code == status and found.json()["detail"], found.text
    for route, body in (
        ("create_model", {"session_id": 5}),
        ("optim_step", {"model_id": "x", "seq_id": -1}),
        ("asample", {"sampling_session_id": "x"}),
    ):
        found = tinker.post(route, **body)
        assert found.status_code == 400 and found.json()["detail"], found.text
    found = tinker.post("optim_step", model_id=tinker.model(), seq_id=1, optimizer_params={"type": "dimuon"})
    assert found.status_code == 400 and "dimuon" in found.json()["detail"]
    assert "not enabled" in tinker.post("create_custom_loss", name="x").json()["detail"]
