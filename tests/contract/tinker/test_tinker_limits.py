"""What is not within its limits is refused with 400 that names the field, by both protocols alike, and the neighbour
goes on as if nothing had happened."""

from typing import Any

import pytest

from tests.support.api_driver import ApiDriver, answer
from tests.support.tinker_driver import OWNER, STRANGER, Tinker, dense, message
from tinkerbell.api.tinker import wire_pb2 as pb

STOPS: list[Any] = [
    [""],
    ["", "END"],
    ["x"] * 17,
    ["y" * 257],
    list(range(65)),
    [-1],
    [-(2**70)],
    [2**70],
    ["nul\0"],
]


@pytest.fixture
def sampler(tinker: Tinker) -> str:
    body = {"session_id": tinker.session(), "sampling_session_seq_id": 0, "base_model": "tiny"}
    found: str = tinker.ok("create_sampling_session", **body)["sampling_session_id"]
    return found


def sample(tinker: Tinker, sampler: str, seq: int, **params: Any) -> Any:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    asked = {"max_tokens": 1, **params}
    return tinker.post("asample", sampling_session_id=sampler, seq_id=seq, prompt=prompt, sampling_params=asked)


def test_stops_beyond_their_limits(tinker: Tinker, api: ApiDriver, sampler: str) -> None:
    stranger = Tinker(api, STRANGER)
    body = {"session_id": stranger.session(), "sampling_session_seq_id": 0, "base_model": "tiny"}
    theirs = stranger.ok("create_sampling_session", **body)["sampling_session_id"]
    head = api.store.head()
    for seq, stop in enumerate([*STOPS, "", ["a", 5]]):
        refused = sample(tinker, sampler, seq, stop=stop)
        assert refused.status_code == 400 and "stop" in refused.json()["detail"], stop
        if not isinstance(stop, list) or stop == ["a", 5]:
            continue
        field = "stop" if isinstance(stop[0], str) else "stop_tokens"
        asked = {"prompt": [1, 2], "params": {"max_tokens": 1, field: stop}}
        told = api.call("POST", "/v1/sample", json=asked, headers={"Authorization": f"Bearer {api.key(OWNER)}"})
        assert told.status_code == 400 and field in told.json()["detail"], stop
    assert api.store.head() == head, "nothing was written"
    made = sample(stranger, theirs, 0, stop=["END"])
    assert made.status_code == 200
    answer(api.store, int(made.json()["request_id"]))
    assert stranger.post("retrieve_future", request_id=made.json()["request_id"]).status_code == 200


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_setting_of_a_loss_that_is_no_number(tinker: Tinker, api: ApiDriver, value: float) -> None:
    model = tinker.model()
    arrays = {name: dense([0.0] * 3, [3]) for name in ("logprobs", "advantages")}
    for seq, field in enumerate(("loss_fn_config", "loss_fn_config_v2"), start=1):
        request = message(model, seq, loss="ppo", **arrays)
        if field == "loss_fn_config":
            request.loss_fn_config["clip_low_threshold"] = value
        else:
            request.loss_fn_config_v2["clip_low_threshold"].CopyFrom(pb.LossConfigValue(number=value))
        headers = {"Content-Type": "application/x-protobuf"}
        refused = tinker.call("POST", "forward_backward", content=request.SerializeToString(), headers=headers)
        assert refused.status_code == 400 and "config" in refused.json()["detail"]
    assert tinker.forward_backward(model, 1).status_code == 200
