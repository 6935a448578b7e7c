"""No tenant can see, use, list or guess what is another's: every route of the OpenAPI document is tried.

A route that is added later is covered without a change here, or fails for a parameter this file does not know.
"""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from tests.support.api_driver import ApiDriver, answer, datum, problem, record_environment
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore

OWNER, STRANGER = "owner", "stranger"

PUBLIC = {"healthz", "readyz"}
"""Operations without a key; test_api_health.py looks at them."""

STREAMS = {"stream_events"}
"""Operations whose answer does not end; test_api_server.py reads them."""

NO_IDS = {
    "list_adapters",
    "list_checkpoints",
    "list_futures",
    "list_runs",
    "show_limits",
    "show_usage",
    "show_queue",
    "list_models",
    "sample_base_model",
}
"""Operations that work without an id of anything: what they answer must hold nothing of another tenant."""

TELLING = {"show_limits", "show_queue"}
"""What a tenant that has nothing is told something by."""

SHARED = {"list_models"}
"""Operations whose answer is the same for everybody."""


class World:
    """Two tenants; the owner has one of everything."""

    def __init__(self, api: ApiDriver) -> None:
        self.api = api
        self.adapter = api.adapter(OWNER, name="secret-name")
        path = f"/v1/adapters/{self.adapter}"
        self.checkpoint = api.complete(f"{path}/checkpoints", OWNER)["result"]["checkpoint_id"]
        self.future = api.complete(f"{path}/fwdbwd", OWNER, {"data": [datum()]})["id"]
        self.pending = api.submit(f"{path}/optim_step", OWNER)["id"]
        self.document: dict[str, Any] = api.get("/schema/openapi.json").json()
        self.path_values = {
            "adapter_id": self.adapter,
            "checkpoint_id": self.checkpoint,
            "future_id": str(self.future),
        }
        self.unknown_values = {
            "adapter_id": f"ad_{'a' * 20}",
            "checkpoint_id": f"ck_{'a' * 20}",
            "future_id": str(10**9),
        }

    def operations(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Method, path template, operation; of routes that need a key."""
        for path, item in self.document["paths"].items():
            for method, operation in item.items():
                if operation["operationId"] not in PUBLIC:
                    yield method.upper(), path, operation

    def body(self, operation: dict[str, Any], ids: dict[str, str]) -> Any:
        """A valid body of a route, with these ids wherever it has room for one."""
        if "requestBody" not in operation:
            return None
        reference: str = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        fields = self.document["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
        known: dict[str, Any] = {
            "adapter_id": ids.get("adapter_id"),
            "checkpoint": ids.get("checkpoint_id"),
            "future_id": int(ids.get("future_id", 0)),
            "data": [datum()],
            "num_targets": 1,
            "prompt": [1, 2],
            "params": {"max_tokens": 1},
        }
        optional = {"base_model", "lora", "seed", "name", "with_optimizer", "loss", "seq", "adam", "wait_s", "outputs"}
        optional |= {"prompt_targets", "overwrite"}
        unknown = set(fields) - set(known) - optional
        assert not unknown, f"{operation['operationId']}: teach this test what {unknown} may hold"
        return {name: value for name, value in known.items() if name in fields}

    def names_something(self, operation: dict[str, Any]) -> bool:
        """Whether a call names a thing that belongs to a tenant."""
        body = self.body(operation, self.path_values)
        in_body = isinstance(body, dict) and {"adapter_id", "checkpoint", "future_id"} & set(body)
        in_path = any(parameter["in"] == "path" for parameter in operation.get("parameters", []))
        return bool(in_body) or in_path

    def call(self, method: str, path: str, operation: dict[str, Any], tenant: str | None, ids: dict[str, str]) -> Any:
        """The route with these ids."""
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "path":
                assert parameter["name"] in ids, f"{path}: teach this test what {parameter['name']} is"
                path = path.replace("{" + parameter["name"] + "}", ids[parameter["name"]])
        body = self.body(operation, ids)
        return self.api.call(method, path, tenant, **({"json": body} if body is not None else {}))


@pytest.fixture
def world(settings: Settings, store: EventStore) -> Iterator[World]:
    record_environment(store)
    with ApiDriver(msgspec.structs.replace(settings, auth="keys"), store) as api:
        yield World(api)


def test_what_is_anothers_is_not_there(world: World) -> None:
    """404 in the very words used for what does not exist, and no trace in the log."""
    head, tried = world.api.store.head(), []
    for method, path, operation in world.operations():
        if not world.names_something(operation):
            continue
        foreign = world.call(method, path, operation, STRANGER, world.path_values)
        unknown = world.call(method, path, operation, STRANGER, world.unknown_values)
        texts = []
        for response, ids in ((foreign, world.path_values), (unknown, world.unknown_values)):
            text: str = problem(response, 404, "not-found")["detail"]
            for name, value in ids.items():
                text = text.replace(value, name)
            texts.append(text)
        assert texts[0] == texts[1], path
        tried.append(operation["operationId"])
    assert world.api.store.read(head, types=None) == world.api.store.read(head, tenant=STRANGER, types=["key.created"])
    assert len(tried) >= 18
    assert {"remove_lora", "alias_retrieve_future", "download_checkpoint", "add_lora"} <= set(tried)


def test_the_owner_reaches_all_of_it(world: World) -> None:
    """The calls refused to the stranger are good ones."""
    for method, path, operation in world.operations():
        if operation["operationId"] in STREAMS | {"remove_lora"}:
            continue
        response = world.call(method, path, operation, OWNER, world.path_values)
        assert response.status_code in (200, 202), (path, response.text)
        if response.status_code == 202:
            # Answered, so that what follows finds the adapter at rest; requests are answered in their order.
            for future in world.api.get("/v1/futures", OWNER).json():
                answer(world.api.store, future["id"])


def test_lists_hold_nothing_of_anothers(world: World) -> None:
    secrets = (world.adapter, world.checkpoint, "secret-name", OWNER)
    # First what only reads: the stranger has nothing of its own then.
    for method, path, operation in sorted(world.operations(), key=lambda found: found[0] != "GET"):
        name = operation["operationId"]
        if world.names_something(operation) or name in STREAMS:
            continue
        assert name in NO_IDS, f"{name}: say in NO_IDS that this route takes no id"
        response = world.call(method, path, operation, STRANGER, {})
        assert response.status_code in (200, 202), (path, response.text)
        for secret in secrets:
            assert secret not in response.text, path
        if name not in SHARED | TELLING and method == "GET":
            assert response.json() == [], path


def test_no_route_answers_without_a_key(world: World) -> None:
    for method, path, operation in world.operations():
        problem(world.call(method, path, operation, None, world.path_values), 401, "unauthorized")


def test_filters_do_not_reach_over(world: World) -> None:
    problem(world.api.get(f"/v1/events?adapter_id={world.adapter}", STRANGER), 404, "not-found")
    problem(world.api.get("/v1/usage?all_tenants=true", STRANGER), 403, "forbidden")
    problem(world.api.get("/v1/queue?all_tenants=true", STRANGER), 403, "forbidden")


def test_idempotency_keys_are_each_tenants_own(world: World) -> None:
    headers = {"Idempotency-Key": "same"}
    mine = world.api.submit("/v1/adapters", OWNER, {"name": "a"}, headers=headers)
    other = world.api.submit("/v1/adapters", STRANGER, {"name": "b"}, headers=headers)
    assert mine["id"] != other["id"]
