"""Whatever arrives: a clear 4xx problem, a server that lives, a log that is whole."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.api_driver import MODEL, ApiDriver, answer, datum, problem, record_environment
from tinkerbell.config import Limits, Settings
from tinkerbell.events import kinds
from tinkerbell.events.store import EventStore

JSON = {"Content-Type": "application/json"}

ACCEPTED = {
    "add_lora.requested",
    "add_lora.completed",
    "save.requested",
    "save.completed",
    "optim_step.requested",
    "optim_step.failed",
}
"""What these tests submit that is good."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[ApiDriver]:
    """One server for all of it; in the end its log is whole."""
    data_dir = tmp_path_factory.mktemp("data")
    shutil.copyfile(sqlite_template, data_dir / "tinkerbell.db")
    settings = Settings(data_dir=str(data_dir), executor="fake")
    store = EventStore.open(settings)
    record_environment(store)
    with ApiDriver(settings, store) as driver:
        yield driver
        store.check()
    store.close()


@pytest.fixture
def api(server: ApiDriver) -> Iterator[ApiDriver]:
    """After every test the server still works, and what was refused is not in the log."""
    head = server.store.head()
    yield server
    types = {kinds.type_of(recorded.event) for recorded in server.store.read(head)}
    assert types <= ACCEPTED
    assert server.get("/v1/usage").status_code == 200


@pytest.fixture(scope="module")
def adapter(server: ApiDriver) -> str:
    return server.adapter()


def train(**changes: Any) -> dict[str, Any]:
    return {"data": [{**datum(3), **changes}]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"data": []}, "`array` of length >= 1"),
        ({}, "missing required field `data`"),
        ({"data": None}, "Expected `array`, got `null`"),
        (train(tokens=[]), "`array` of length >= 1"),
        (train(tokens=[1, 2, 100]), "data[0].tokens[2] is 100; the vocabulary"),
        (train(tokens=[1, 2, -1]), "Expected `int` >= 0"),
        (train(tokens=[1, 2, 10**30]), "body:"),
        (train(tokens=[1, 2, 2**31]), "Expected `int` <= 2147483647"),
        (train(tokens=[1, 2, 1.5]), "Expected `int`, got `float`"),
        (train(tokens=["1", "2", "3"]), "Expected `int`, got `str`"),
        (train(tokens=[True, False, True]), "Expected `int`, got `bool`"),
        (train(targets=[1]), "3 tokens and 1 targets"),
        (train(loss_inputs={"weights": [1.0, 1.0]}), "2 numbers for 3 tokens"),
        (train(loss_inputs={"weights": [1.0, 1.0, None]}), "Expected `float`, got `null`"),
        (train(loss_inputs={"weights": [1.0, 1.0, 1e300]}), "must be a finite float32"),
        (train(loss_inputs={"rewards": [1.0, 1.0, 1.0]}), "cross_entropy reads no 'rewards'"),
        ({**train(), "loss": {"name": "ppo"}}, "ppo needs 'logprobs'"),
        ({**train(), "loss": {"name": "../../etc/passwd"}}, "is none of cross_entropy"),
        ({**train(), "loss": {"name": "ppo", "config": {"x": 1}}}, "no setting 'x'"),
        ({**train(), "typo": 1}, "unknown field `typo`"),
        (train(typo=1), "unknown field `typo`"),
        ({**train(), "seq": -1}, ">= 0"),
        (train(tokens=[1] * (MODEL.max_length + 1), targets=[1] * (MODEL.max_length + 1)), "tiny takes at most 32"),
    ],
)
def test_training_data(api: ApiDriver, adapter: str, body: dict[str, Any], words: str) -> None:
    for route in ("forward", "fwdbwd"):
        refused = problem(api.post(f"/v1/adapters/{adapter}/{route}", json=body), 400, "invalid-request")
        assert words in refused["detail"]


@pytest.mark.parametrize(
    ("adam", "words"),
    [
        ({"learning_rate": -1}, ">= 0"),
        ({"learning_rate": 1e9}, "<= 10"),
        ({"beta1": 1.0}, "< 1"),
        ({"eps": 0}, "adam.eps"),
        ({"learning_rate": "fast"}, "Expected `float`, got `str`"),
        ({"momentum": 0.9}, "unknown field `momentum`"),
    ],
)
def test_optimizer_settings(api: ApiDriver, adapter: str, adam: dict[str, Any], words: str) -> None:
    refused = api.post(f"/v1/adapters/{adapter}/optim_step", json={"adam": adam})
    assert words in problem(refused, 400, "invalid-request")["detail"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": []}, "length >= 1"),
        ({"prompt": [100], "params": {"max_tokens": 1}}, "prompt[0] is 100"),
        ({"prompt": [1], "params": {"max_tokens": 32}}, "33 together; tiny takes at most 32"),
        ({"prompt": [1] * 32, "params": {"max_tokens": 2}}, "34 together; tiny takes at most 32"),
        ({"prompt": [1] * 33, "params": {"max_tokens": 1}}, "34 together; tiny takes at most 32"),
        ({"prompt": [1], "params": {"max_tokens": 0}}, ">= 1"),
        ({"prompt": [1], "params": {"temperature": -1}}, ">= 0"),
        ({"prompt": [1], "params": {"top_p": 0}}, "> 0"),
        ({"prompt": [1], "params": {"num_samples": 10**6}}, "<= 256"),
        ({"prompt": [1], "params": {"seed": 2**63}}, "seed"),
        ({"prompt": [1], "params": {"stop": [""]}}, "length >= 1"),
        ({"prompt": [1], "params": {"max_tokens": 1, "stop_tokens": [100]}}, "stop_tokens[0] is 100"),
    ],
)
def test_sampling(api: ApiDriver, adapter: str, body: dict[str, Any], words: str) -> None:
    for path in ("/v1/sample", f"/v1/adapters/{adapter}/sample"):
        assert words in problem(api.post(path, json=body), 400, "invalid-request")["detail"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"base_model": "other"}, "serves 'tiny', not 'other'"),
        ({"lora": {"rank": 0}}, ">= 1"),
        ({"lora": {"rank": 10**9}}, "<= 1024"),
        ({"lora": {"alpha": 0}}, "> 0"),
        ({"lora": {"targets": []}}, "length >= 1"),
        ({"lora": {"targets": ["lm_head"]}}, "tiny has no 'lm_head'"),
        ({"seed": -1}, ">= 0"),
        ({"name": "a b"}, "name"),
        ({"name": "a\n"}, "name"),
        ({"name": "x" * 65}, "name"),
    ],
)
def test_adapters(api: ApiDriver, body: dict[str, Any], words: str) -> None:
    assert words in problem(api.post("/v1/adapters", json=body), 400, "invalid-request")["detail"]


def test_settings_beside_a_checkpoint(api: ApiDriver, adapter: str) -> None:
    checkpoint = api.complete(f"/v1/adapters/{adapter}/checkpoints")["result"]["checkpoint_id"]
    refused = api.post("/v1/adapters", json={"checkpoint": checkpoint, "lora": {"rank": 4}})
    assert "lora: leave it out" in problem(refused, 400, "invalid-request")["detail"]
    problem(api.post("/v1/adapters", json={"checkpoint": f"ck_{'a' * 20}"}), 404, "not-found")
    nul = problem(api.post("/v1/adapters", json={"checkpoint": "\x00"}), 400, "invalid-request")
    assert "NUL" in nul["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"data":' * 100_000,
        b'{"data":[{"tokens":' + b"[" * 100_000,
        b'{"x":' + b"[" * 100_000,
        b'{"data":[{"tokens":[NaN],"targets":[1]}]}',
        b'{"data":[{"tokens":[1],"targets":[1],"loss_inputs":{"weights":[Infinity]}}]}',
        b'{"data":[{"tokens":[1],"targets":[1],"loss_inputs":{"weights":[1e400]}}]}',
        b'{"data":[{"tokens":[1],"targets":[1],"loss_inputs":{"\xff":[1]}}]}',
        b'{"data":[{"tokens":[1],"targets":[1],"loss_inputs":{"\\ud800":[1]}}]}',
        b"",
        b"null",
        b"\x00",
        b'{"data"',
        b"\xef\xbb\xbf{}",
        b"data=1",
    ],
)
def test_bytes_that_are_no_request(api: ApiDriver, adapter: str, body: bytes) -> None:
    for path in (f"/v1/adapters/{adapter}/fwdbwd", "/fwdbwd"):
        for key in ({}, {"Idempotency-Key": "k"}):
            problem(api.call("POST", path, content=body, headers={**JSON, **key}), 400, "invalid-request")


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/xml"]
)
def test_other_content_types(api: ApiDriver, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    problem(api.call("POST", "/v1/adapters", content=b"{}", headers=headers), 415, "unsupported-media-type")


def test_a_body_of_50_mb(api: ApiDriver, adapter: str) -> None:
    body = b'{"data":[' + b" " * 50 * 1024 * 1024 + b"]}"
    refused = api.call("POST", f"/v1/adapters/{adapter}/fwdbwd", content=body, headers=JSON)
    assert "at most 50331648 bytes" in problem(refused, 413, "too-large")["detail"]


def test_a_body_that_hides_its_length(settings: Settings, sqlite_store: EventStore) -> None:
    small = msgspec.structs.replace(settings, limits=Limits(max_body_bytes=1000))

    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * 100

    with ApiDriver(small, sqlite_store) as api:
        problem(api.call("POST", "/v1/adapters", content=chunks(), headers=JSON), 413, "too-large")


def test_too_many_tokens(settings: Settings, sqlite_store: EventStore) -> None:
    record_environment(sqlite_store)
    small = msgspec.structs.replace(settings, limits=Limits(max_request_tokens=5))
    with ApiDriver(small, sqlite_store) as api:
        adapter = api.adapter()
        refused = problem(
            api.post(f"/v1/adapters/{adapter}/fwdbwd", json={"data": [datum(3), datum(3)]}), 413, "too-large"
        )
        assert (refused["num_tokens"], refused["limit"]) == (6, 5)


def test_too_many_bytes_of_outputs(settings: Settings, sqlite_store: EventStore) -> None:
    record_environment(sqlite_store)
    small = msgspec.structs.replace(settings, limits=Limits(max_output_bytes=5 * 4 * MODEL.vocab_size))
    with ApiDriver(small, sqlite_store) as api:
        path = f"/v1/adapters/{api.adapter()}/forward"
        before = sqlite_store.head()
        refused = problem(
            api.post(path, json={"data": [datum(3), datum(3)], "outputs": {"logits": True}}), 413, "too-large"
        )
        assert (refused["num_bytes"], refused["limit"]) == (2400, 2000)
        assert "would have 2400 bytes; those of a request may have 2000" in refused["detail"]
        assert "top_k instead of all 100 logits" in refused["detail"]
        many = {"data": [datum(9)] * 4, "outputs": {"top_k": 7}}
        assert "logits" not in problem(api.post(path, json=many), 413, "too-large")["detail"]
        assert sqlite_store.head() == before
        api.submit(path, json={"data": [datum(5)], "outputs": {"logits": True}})


@pytest.mark.parametrize(
    ("outputs", "detail"),
    [
        ({"top_k": 65}, "outputs.top_k"),
        ({"top_k": -1}, "outputs.top_k"),
        ({"entropies": True}, "entropies"),
        ({"logits": 1}, "outputs.logits"),
        ([], "outputs"),
    ],
)
def test_outputs_that_cannot_be(api: ApiDriver, outputs: object, detail: str) -> None:
    path = f"/v1/adapters/{api.adapter()}/forward"
    refused = problem(api.post(path, json={"data": [datum(3)], "outputs": outputs}), 400, "invalid-request")
    assert detail in str(refused)


@pytest.mark.parametrize(
    ("asked", "detail"),
    [
        ({"params": {"top_logprobs": 65}}, "top_logprobs"),
        ({"params": {"prompt_top_logprobs": -1}}, "prompt_top_logprobs"),
        ({"params": {"prompt_draws": 65}}, "prompt_draws"),
        ({"prompt_targets": []}, "prompt_targets"),
        ({"prompt_targets": [[], [], []]}, "prompt_targets"),
        ({"prompt_targets": [[1], [2]]}, "prompt_targets has 2 rows for 3 prompt tokens"),
        ({"prompt_targets": [[1], [2, 3], [4]]}, "prompt_targets[1] has 2 tokens and prompt_targets[0] 1"),
        ({"prompt_targets": [[1], [2], [-2]]}, "prompt_targets"),
        ({"prompt_targets": [[1], [100], [2]]}, "prompt_targets[1][0] is 100"),
        ({"prompt_targets": [[1] * 1025] * 3}, "prompt_targets"),
        ({"prompt_targets": [[1.5], [1], [1]]}, "prompt_targets"),
        ({"prompt_targets": [[None], [1], [1]]}, "prompt_targets"),
    ],
)
def test_distributions_of_a_sample_that_cannot_be(api: ApiDriver, asked: dict[str, Any], detail: str) -> None:
    body = {"prompt": [1, 2, 3], **asked, "params": {"max_tokens": 4, **asked.get("params", {})}}
    refused = problem(api.post(f"/v1/adapters/{api.adapter()}/sample", json=body), 400, "invalid-request")
    assert detail in str(refused)


def test_too_many_bytes_of_a_samples_distributions(settings: Settings, sqlite_store: EventStore) -> None:
    record_environment(sqlite_store)
    small = msgspec.structs.replace(settings, limits=Limits(max_output_bytes=192))
    with ApiDriver(small, sqlite_store) as api:
        path = f"/v1/adapters/{api.adapter()}/sample"
        before = sqlite_store.head()
        params = {"max_tokens": 4, "num_samples": 2, "top_logprobs": 2, "prompt_top_logprobs": 2, "prompt_draws": 1}
        body = {"prompt": [1, 2, 3], "params": params, "prompt_targets": [[1, 2]] * 3}
        refused = problem(api.post(path, json=body), 413, "too-large")
        assert (refused["num_bytes"], refused["limit"]) == (2 * 4 * 2 * 8 + 2 * 3 * 8 + 3 * 2 * 4, 192)
        assert sqlite_store.head() == before
        api.submit(path, json=body | {"prompt_targets": [[1]] * 3})


def test_outputs_are_for_a_forward(api: ApiDriver) -> None:
    body = {"data": [datum(3)], "outputs": {"entropy": True}}
    refused = problem(api.post(f"/v1/adapters/{api.adapter()}/fwdbwd", json=body), 400, "invalid-request")
    assert "outputs" in str(refused)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/adapters/ad_%00",
        "/v1/adapters/" + "a" * 5000,
        "/v1/adapters/ad_%F0%9F%92%A5",
        "/v1/adapters/..%2f..%2fetc",
        "/v1/adapters/' OR 1=1 --",
        "/v1/checkpoints/%ff",
        "/v1/futures/0",
        "/v1/futures/-1",
        "/v1/futures/99999999999999999999999999",
        "/v1/futures/abc",
        "/v1/runs/x",
        "/v1/nothing",
        "/../../etc/passwd",
    ],
)
def test_ids_that_are_none(api: ApiDriver, path: str) -> None:
    problem(api.get(path), 404, "not-found")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/futures/1?wait_s=61",
        "/v1/futures/1?wait_s=-1",
        "/v1/futures/1?wait_s=nan",
        "/v1/futures/1?wait_s=x",
        "/v1/futures?after=-1",
        "/v1/futures?after=99999999999999999999999",
        "/v1/futures?limit=0",
        "/v1/adapters?limit=1001",
        "/v1/adapters?offset=-1",
        "/v1/runs?offset=9223372036854775808",
        "/v1/events?after=x",
        "/v1/events?after=-1",
        "/v1/usage?all_tenants=maybe",
    ],
)
def test_parameters_out_of_range(api: ApiDriver, path: str) -> None:
    problem(api.get(path), 400, "invalid-request")


def test_a_foreign_last_event_id(api: ApiDriver) -> None:
    for value in ("x", "-1", "9" * 30):
        problem(api.get("/v1/events", headers={"Last-Event-ID": value}), 400, "invalid-request")


@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "/v1/adapters"), ("DELETE", "/v1/futures/1"), ("GET", "/add_lora")]
)
def test_methods_that_are_none(api: ApiDriver, method: str, path: str) -> None:
    answered = api.call(method, path)
    problem(answered, 405, "method-not-allowed")
    assert answered.headers["allow"]


def test_an_optimizer_step_without_gradients_fails_as_the_users(api: ApiDriver, adapter: str) -> None:
    """Only the executor knows; what it says reaches the caller."""
    future = api.submit(f"/v1/adapters/{adapter}/optim_step")
    answer(
        api.store,
        future["id"],
        kinds.OptimStepFailed(category="user", code="no-gradients", message="no gradient was accumulated"),
    )
    done = api.get(f"/v1/futures/{future['id']}").json()
    assert (done["state"], done["error"]["category"]) == ("failed", "user")
