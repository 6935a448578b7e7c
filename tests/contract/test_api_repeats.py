"""A request whose answer was lost is sent again: on every route that changes something, that is as if it came once.

Each walk goes over the routes of the app, so that a new one must say here how it is asked.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest
from litestar.routes import HTTPRoute

from tests.support.api_driver import ApiDriver, answer, datum, record_environment
from tests.support.tinker_driver import LORA, OWNER, Tinker, message
from tinkerbell.config import Settings
from tinkerbell.events import kinds
from tinkerbell.events.store import EventStore

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}

Ask = Callable[[], httpx.Response]


class World:
    """One of everything, and how each route is asked about it."""

    def __init__(self, api: ApiDriver) -> None:
        self.api, self.tinker = api, Tinker(api)
        self.session = self.tinker.session()
        self.model = self.tinker.model(self.session)
        self.state = self.tinker.saved(self.model, 1, "state")
        self.named = self.tinker.saved(self.model, 2, "sampler", "save_weights_for_sampler")
        made = self.tinker.ok("save_weights_for_sampler", model_id=self.model, seq_id=3, sampling_session_seq_id=0)
        answer(api.store, int(made["request_id"]))
        self.sampler = f"{self.session}:sample:0"
        self.adapter = api.adapter(OWNER)
        self.checkpoint = api.complete(f"/v1/adapters/{self.adapter}/checkpoints", OWNER)["result"]["checkpoint_id"]
        sample = {"sampling_session_id": self.sampler, "prompt": PROMPT, "sampling_params": {"max_tokens": 2}}
        self.asked = self.tinker.ok("asample", **sample, seq_id=0)["request_id"]
        self.answered = self.tinker.ok("asample", **sample, seq_id=1)["request_id"]
        answer(api.store, int(self.answered))
        self.future = int(self.answered)
        self.sample = sample
        self.numbers = itertools.count(10)

    def asks(self) -> dict[str, Ask]:
        """Path of a route -> one request to it; called again it is the same request, as its SDK sends it again."""
        number, renumbered = next(self.numbers), self.numbers
        once = {"X-Idempotency-Key": f"once-{number}"}

        def tinker(route: str, body: dict[str, Any], change: Callable[[], dict[str, Any]] = dict) -> Ask:
            return lambda: self.tinker.call("POST", route, json=body | change(), headers=once)

        def native(path: str, body: dict[str, Any]) -> Ask:
            headers = {"Idempotency-Key": f"{path}-{number}"}
            return lambda: self.api.post(path, OWNER, body, headers=headers)

        numbered = {"model_id": self.model, "seq_id": number}
        made = {"session_id": self.session, "model_seq_id": number}
        adapter, data = f"/v1/adapters/{self.adapter}", {"data": [datum()]}
        prompt = {"prompt": [1, 2], "params": {"max_tokens": 2}}
        change = self.state.removeprefix("tinker://")
        model, kind, name = change.split("/")
        published = f"training_runs/{model}/checkpoints/{kind}/{name}/publish"
        return {
            "/api/v1/client/config": tinker("client/config", {"sdk_version": "0.38.0"}),
            "/api/v1/client/dynamic_config": tinker("client/dynamic_config", {"sdk_version": "0.38.0"}),
            "/api/v1/create_session": tinker("create_session", {"sdk_version": "0.38.0"}),
            "/api/v1/session_heartbeat": tinker("session_heartbeat", {"session_id": self.session}),
            "/api/v1/sessions/{session_id:str}/finish": tinker(f"sessions/{self.tinker.session()}/finish", {}),
            "/api/v1/sessions/search": tinker("sessions/search", {}),
            "/api/v1/telemetry": tinker("telemetry", {}),
            "/api/v1/create_model": tinker("create_model", made | {"base_model": "tiny", "lora_config": LORA}),
            "/api/v1/get_info": tinker("get_info", {"model_id": self.model}),
            "/api/v1/forward_backward": lambda: self.tinker.call(
                "POST",
                "forward_backward",
                content=message(self.model, number).SerializeToString(),
                headers={"Content-Type": "application/x-protobuf"},
            ),
            "/api/v1/optim_step": tinker(
                "optim_step", {"model_id": self.model, "seq_id": number + 1000, "adam_params": {}}
            ),
            "/api/v1/save_weights": tinker("save_weights", numbered | {"seq_id": number + 2000, "path": f"s-{number}"}),
            "/api/v1/save_weights_external": tinker(
                "save_weights_external", numbered | {"seq_id": number + 3000, "path": f"e-{number}"}
            ),
            "/api/v1/save_weights_for_sampler": tinker(
                "save_weights_for_sampler",
                {"model_id": self.model, "seq_id": number + 4000},
                # The SDK takes another number each time.
                lambda: {"sampling_session_seq_id": next(renumbered)},
            ),
            "/api/v1/load_weights": tinker("load_weights", made | {"model_seq_id": number + 1, "path": self.state}),
            "/api/v1/create_custom_loss": tinker("create_custom_loss", {}),
            "/api/v1/copy_weights": tinker(
                "copy_weights", {"source_path": self.state, "destination_project_id": "default"}
            ),
            "/api/v1/weights_info": tinker("weights_info", {"tinker_path": self.state}),
            "/api/v1/create_sampling_session": tinker(
                "create_sampling_session",
                {"session_id": self.session, "sampling_session_seq_id": number + 500, "model_path": self.named},
            ),
            "/api/v1/asample": tinker("asample", self.sample | {"seq_id": number}),
            "/api/v1/join_sampling_session": tinker("join_sampling_session", {"sampling_session_id": self.sampler}),
            "/api/v1/retrieve_future": tinker("retrieve_future", {"request_id": self.answered}),
            "/api/v1/retrieve_futures": tinker(
                "retrieve_futures", {"target": {"sampling_session_id": self.sampler}, "timeout": 0}
            ),
            "/api/v1/cancel_future": tinker("cancel_future", {"request_id": self.asked}),
            "/api/v1/training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}/publish": tinker(published, {}),
            "/v1/adapters": native("/v1/adapters", {}),
            "/v1/adapters/{adapter_id:str}/forward": native(f"{adapter}/forward", data),
            "/v1/adapters/{adapter_id:str}/fwdbwd": native(f"{adapter}/fwdbwd", data),
            "/v1/adapters/{adapter_id:str}/optim_step": native(f"{adapter}/optim_step", {}),
            "/v1/adapters/{adapter_id:str}/sample": native(f"{adapter}/sample", prompt),
            "/v1/adapters/{adapter_id:str}/checkpoints": native(f"{adapter}/checkpoints", {"name": f"n-{number}"}),
            "/v1/adapters/{adapter_id:str}/load": native(f"{adapter}/load", {"checkpoint": self.checkpoint}),
            "/v1/sample": native("/v1/sample", prompt),
            "/sample": native("/sample", prompt | {"adapter_id": self.adapter}),
            "/add_lora": native("/add_lora", {}),
            "/fwdbwd": native("/fwdbwd", data | {"adapter_id": self.adapter}),
            "/optim_step": native("/optim_step", {"adapter_id": self.adapter}),
            "/retrieve_future": native("/retrieve_future", {"future_id": self.future}),
        }


GROWS = {"/api/v1/join_sampling_session"}
"""Each time it gives a number that nobody has."""
REFUSED = {"/api/v1/create_custom_loss": 400}


def routes(api: ApiDriver, method: str) -> set[str]:
    return {route.path for route in api.app.routes if isinstance(route, HTTPRoute) and method in route.methods}


@pytest.fixture
def api(settings: Settings, store: EventStore) -> Iterator[ApiDriver]:
    record_environment(store)
    with ApiDriver(msgspec.structs.replace(settings, auth="keys"), store) as driver:
        yield driver


def test_every_post_comes_once_however_often_it_is_sent(api: ApiDriver) -> None:
    world = World(api)
    asks = world.asks()
    assert set(asks) == routes(api, "POST"), "say in World.asks how each POST route is asked"
    for path, ask in asks.items():
        first = ask()
        assert first.status_code == REFUSED.get(path, first.status_code) and (
            path in REFUSED or first.status_code < 300
        ), (path, first.text)
        head = api.store.head()
        for _ in range(2):
            again = ask()
            assert again.status_code == first.status_code, (path, again.text)
            if path not in GROWS:
                assert asked_for(again) == asked_for(first), path
                assert api.store.head() == head, f"{path} wrote something the second time"
    api.store.check()


def test_a_request_that_was_answered_meanwhile_is_not_asked_again(api: ApiDriver) -> None:
    """The answer to the first may long be there, and what it was about gone, when the second comes."""
    world = World(api)
    asks = world.asks()
    firsts = {path: ask() for path, ask in asks.items() if path not in REFUSED and path not in GROWS}
    for row in api.store.queries.pending(OWNER):
        answer(api.store, row.id)
    head = api.store.head()
    for path, first in firsts.items():
        again = asks[path]()
        assert again.status_code == first.status_code, (path, again.text)
        for name in ("request_id", "id", "session_id", "tinker_path", "sampling_session_id"):
            assert named(again, name) == named(first, name), path
    assert api.store.head() == head
    api.store.check()


def asked_for(found: httpx.Response) -> Any:
    """The answer without what tells the moment: the place in a line that moves."""
    if not found.headers.get("content-type", "").startswith("application/json"):
        return found.content
    body = found.json()
    return {name: value for name, value in body.items() if name != "place"} if isinstance(body, dict) else body


def named(found: httpx.Response, name: str) -> Any:
    if not found.headers.get("content-type", "").startswith("application/json"):
        return None
    body = found.json()
    return body.get(name) if isinstance(body, dict) else None


def test_an_unnamed_sampler_is_that_of_the_first_time(api: ApiDriver) -> None:
    """Whatever number the SDK sends the same save with: the first one is made, and no other."""
    tinker = Tinker(api)
    model = tinker.model()
    session = model.partition(":")[0]
    body = {"model_id": model, "seq_id": 1, "kind": "snapshot"}
    first, *again = (
        tinker.ok("save_weights_for_sampler", **body, sampling_session_seq_id=number)["request_id"]
        for number in (0, 1, 2)
    )
    assert again == [first, first]
    assert [row.id for row in api.store.queries.samplers(OWNER, session)] == [f"{session}:sample:0"]
    answer(api.store, int(first))
    assert tinker.ok("retrieve_future", request_id=first)["sampling_session_id"] == f"{session}:sample:0"
    other = tinker.post("save_weights_for_sampler", **body, sampling_session_seq_id=3, ttl_seconds=7200)
    assert other.status_code == 400 and "another request" in other.json()["detail"]
    later = tinker.ok("save_weights_for_sampler", **(body | {"seq_id": 2}), sampling_session_seq_id=3)["request_id"]
    assert later != first
    api.store.check()


def test_every_delete_may_come_again(api: ApiDriver) -> None:
    tinker = Tinker(api)
    model = tinker.model()
    tinker.saved(model, 1)
    checkpoint = f"training_runs/{model}/checkpoints/weights/step-1"
    adapter = api.adapter(OWNER)

    def removed() -> httpx.Response:
        found = api.call("DELETE", f"/v1/adapters/{adapter}", OWNER)
        if api.store.queries.pending(OWNER):
            answer(api.store, found.json()["id"])
        return found

    asks: dict[str, Ask] = {
        "/api/v1/training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}/publish": lambda: tinker.call(
            "DELETE", f"{checkpoint}/publish"
        ),
        "/api/v1/training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}": lambda: tinker.call(
            "DELETE", checkpoint
        ),
        "/v1/adapters/{adapter_id:str}": removed,
        "/api/v1/auth/apikey/me": lambda: tinker.call("DELETE", "auth/apikey/me"),
    }
    assert set(asks) == routes(api, "DELETE"), "say here how each DELETE route is asked"
    for route, ask in asks.items():
        first = ask()
        assert first.status_code in (202, 204), (route, first.text)
        for _ in range(2):
            again = ask()
            assert again.status_code == first.status_code, (route, again.text)
            if first.status_code == 202:
                assert again.json()["id"] == first.json()["id"]
    assert all(key.revoked_us is not None for key in api.store.queries.keys(OWNER))
    # Where the key is known to be revoked, too, by those who had not seen it before.
    api.app.state.context.gate._keys.clear()
    assert tinker.call("GET", "checkpoints").status_code == 401, "it opens nothing else"
    assert tinker.call("DELETE", "auth/apikey/me").status_code == 204
    api.store.check()


def test_a_delete_that_comes_late_spares_what_has_the_name_now(api: ApiDriver) -> None:
    tinker = Tinker(api)
    model = tinker.model()
    tinker.saved(model, 1)
    route = f"training_runs/{model}/checkpoints/weights/step-1"
    once = {"X-Idempotency-Key": "stainless-python-retry-one"}
    assert tinker.call("DELETE", route, headers=once).status_code == 204
    tinker.saved(model, 2)
    assert tinker.call("DELETE", route, headers=once).status_code == 204
    (kept,) = tinker.call("GET", f"training_runs/{model}/checkpoints").json()["checkpoints"]
    assert kept["checkpoint_id"] == "weights/step-1"
    assert tinker.call("DELETE", route, headers={"X-Idempotency-Key": "another"}).status_code == 204
    assert tinker.call("GET", f"training_runs/{model}/checkpoints").json()["checkpoints"] == []


def test_what_never_was_cannot_be_deleted(api: ApiDriver) -> None:
    tinker = Tinker(api)
    model, stranger = tinker.model(), Tinker(api, "stranger")
    tinker.saved(model, 1)
    for whose, name in ((tinker, "other"), (stranger, "step-1")):
        found = whose.call("DELETE", f"training_runs/{model}/checkpoints/weights/{name}")
        assert found.status_code == 404
    adapter = api.adapter(OWNER)
    assert api.call("DELETE", f"/v1/adapters/{adapter}", "stranger").status_code == 404
    assert api.call("DELETE", "/v1/adapters/ad_aaaaaaaaaaaaaaaaaaaa", OWNER).status_code == 404


def test_a_removal_that_failed_is_asked_again(api: ApiDriver) -> None:
    adapter = api.adapter(OWNER)
    first = api.call("DELETE", f"/v1/adapters/{adapter}", OWNER).json()
    answer(api.store, first["id"], kinds.RemoveLoraFailed(category="server", code="executor-died", message="It died."))
    second = api.call("DELETE", f"/v1/adapters/{adapter}", OWNER).json()
    assert second["id"] != first["id"]
    answer(api.store, second["id"])
    assert api.call("DELETE", f"/v1/adapters/{adapter}", OWNER).json()["id"] == second["id"]
