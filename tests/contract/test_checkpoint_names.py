"""A name leads to one checkpoint, whoever saves under it at the same time."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from tests.support.api_driver import ApiDriver, answer, problem, record_environment
from tests.support.tinker_driver import OWNER, Tinker
from tinkerbell.api.submitting import MAX_SAVES_AT_ONCE
from tinkerbell.config import Settings
from tinkerbell.errors import NameTaken, NotFound
from tinkerbell.events import kinds
from tinkerbell.events.store import EventStore

ROUTES = ("save_weights", "save_weights_external", "save_weights_for_sampler")


@pytest.fixture
def api(settings: Settings, store: EventStore) -> Iterator[ApiDriver]:
    record_environment(store)
    with ApiDriver(msgspec.structs.replace(settings, auth="keys"), store) as driver:
        yield driver


def at_once(api: ApiDriver, *asked: tuple[str, dict[str, Any]]) -> list[httpx.Response]:
    """Answers of requests that are under way together."""
    headers = {"X-API-Key": f"tml-{api.key(OWNER)}"}

    async def all_of_them() -> list[httpx.Response]:
        calls = [api.acall("POST", path, headers=headers, json=body) for path, body in asked]
        return await asyncio.gather(*calls)

    found: list[httpx.Response] = api.run(all_of_them())
    return found


def answer_all(api: ApiDriver) -> None:
    for row in api.store.queries.pending(OWNER):
        answer(api.store, row.id)


@pytest.mark.parametrize("route", ROUTES)
def test_of_two_saves_at_once_one_is_refused(api: ApiDriver, route: str) -> None:
    tinker = Tinker(api)
    model = tinker.model()
    saves = [(f"/api/v1/{route}", {"model_id": model, "seq_id": seq, "path": "one"}) for seq in range(1, 9)]
    found = at_once(api, *saves)
    accepted = [each for each in found if each.status_code == 200]
    assert len(accepted) == 1 and {each.status_code for each in found} == {200, 400}
    assert all("already, or it is being saved" in each.json()["detail"] for each in found if each.status_code == 400)
    # Also while the first is under way, and after it.
    late = {"model_id": model, "seq_id": 20, "path": "one"}
    assert tinker.post(route, **late).status_code == 400
    answer_all(api)
    assert tinker.post(route, **late).status_code == 400
    path = tinker.ok("retrieve_future", request_id=accepted[0].json()["request_id"])["path"]
    (row,) = api.store.queries.checkpoints(OWNER)
    asked = api.store.get(int(accepted[0].json()["request_id"]))
    assert asked is not None and isinstance(asked.event, kinds.SaveRequested) and asked.event.checkpoint == row.id
    checkpoint = path.removeprefix("tinker://").replace(f"{model}/", f"training_runs/{model}/checkpoints/")
    assert tinker.call("DELETE", checkpoint).status_code == 204
    assert tinker.post(route, **late).status_code == 200
    api.store.check()


def test_a_save_that_failed_has_no_name(api: ApiDriver) -> None:
    tinker = Tinker(api)
    model = tinker.model()
    first = tinker.ok("save_weights", model_id=model, seq_id=1, path="one")["request_id"]
    answer(api.store, int(first), kinds.SaveFailed(category="server", code="executor-died", message="It died."))
    tinker.saved(model, 2, "one")


def test_other_names_uses_and_models_are_other_names(api: ApiDriver) -> None:
    tinker = Tinker(api)
    session = tinker.session()
    first, second = tinker.model(session, 0), tinker.model(session, 1)
    paths = {tinker.saved(model, 1 + i, "one", route) for model in (first, second) for i, route in enumerate(ROUTES)}
    assert len(paths) == 6
    tinker.saved(first, 9, "two")


def test_overwriting_at_once_leaves_one(api: ApiDriver) -> None:
    """Each replaces those before it, and in the end the name leads to the last; the others are gone."""
    tinker = Tinker(api)
    model = tinker.model()
    body = {"model_id": model, "path": "one", "overwrite": True}
    found = at_once(api, *(("/api/v1/save_weights", body | {"seq_id": seq}) for seq in range(1, 6)))
    assert [each.status_code for each in found] == [200] * 5
    answer_all(api)
    rows = api.store.queries.checkpoints(OWNER)
    assert [row.deleted for row in rows] == [True] * 4 + [False]
    (listed,) = tinker.call("GET", f"training_runs/{model}/checkpoints").json()["checkpoints"]
    assert listed["checkpoint_id"] == "weights/one"
    session = model.partition(":")[0]
    loaded = tinker.ok("load_weights", session_id=session, model_seq_id=1, path=f"tinker://{model}/weights/one")[
        "request_id"
    ]
    event = api.store.get(int(loaded))
    assert event is not None and isinstance(event.event, kinds.AddLoraRequested)
    assert event.event.checkpoint == rows[-1].id
    assert tinker.call("DELETE", f"training_runs/{model}/checkpoints/weights/one").status_code == 204
    assert tinker.call("GET", "checkpoints").json()["checkpoints"] == []
    api.store.check()


def test_many_overwriting_saves_wait_for_one_another(api: ApiDriver) -> None:
    tinker = Tinker(api)
    model = tinker.model()
    body = {"model_id": model, "path": "one", "overwrite": True}
    for seq in range(MAX_SAVES_AT_ONCE):
        tinker.ok("save_weights", **body, seq_id=1 + seq)
    found = tinker.post("save_weights", **body, seq_id=100)
    assert found.status_code == 429 and int(found.headers["Retry-After"]) >= 1
    assert tinker.post("save_weights", **body, seq_id=1).status_code == 200, "one that was accepted is asked again"
    answer_all(api)
    tinker.saved(model, 100, "one", overwrite=True)
    assert [row.deleted for row in api.store.queries.checkpoints(OWNER)] == [True] * MAX_SAVES_AT_ONCE + [False]


def test_what_an_overwriting_save_does_not_make_it_does_not_take(api: ApiDriver) -> None:
    tinker = Tinker(api)
    model = tinker.model()
    tinker.saved(model, 1, "one")
    again = tinker.ok("save_weights", model_id=model, seq_id=2, path="one", overwrite=True)["request_id"]
    answer(api.store, int(again), kinds.SaveFailed(category="server", code="executor-died", message="It died."))
    (listed,) = tinker.call("GET", f"training_runs/{model}/checkpoints").json()["checkpoints"]
    assert listed["checkpoint_id"] == "weights/one"
    tinker.saved(model, 3, "one", overwrite=True)
    assert [row.deleted for row in api.store.queries.checkpoints(OWNER)] == [True, False]


def test_an_expired_checkpoint_gives_its_name_up(api: ApiDriver) -> None:
    tinker = Tinker(api)
    model = tinker.model()
    tinker.saved(model, 1, "one")
    (row,) = api.store.queries.checkpoints(OWNER)
    expired = kinds.CheckpointChanged(checkpoint=row.id, expires_us=1, published=False)
    api.store.append(kinds.NewEvent(event=expired, tenant=OWNER, stream=f"tenant/{OWNER}"))
    tinker.saved(model, 2, "one")
    assert len(tinker.call("GET", f"training_runs/{model}/checkpoints").json()["checkpoints"]) == 1


def test_what_older_releases_saved_under_one_name_is_deleted_together(api: ApiDriver) -> None:
    tinker, store = Tinker(api), api.store
    model = tinker.model()
    tinker.saved(model, 1, "one")
    again = tinker.ok("save_weights", model_id=model, seq_id=2, path="one", overwrite=True)["request_id"]
    asked = store.get(int(again))
    assert asked is not None and isinstance(asked.event, kinds.SaveRequested)
    # They did not say what a save replaces.
    (first,) = store.queries.checkpoints(OWNER)
    older = kinds.SaveCompleted(
        checkpoint=asked.event.checkpoint,
        name="one",
        step=0,
        lora=first.lora,
        num_bytes=1,
        state_digest=first.state_digest,
    )
    store.append(
        kinds.NewEvent(event=older, tenant=OWNER, stream=asked.stream, adapter=model, causation=asked.position)
    )
    assert [row.deleted for row in store.queries.checkpoints(OWNER)] == [False, False]
    assert tinker.call("DELETE", f"training_runs/{model}/checkpoints/weights/one").status_code == 204
    assert [row.deleted for row in store.queries.checkpoints(OWNER)] == [True, True]
    tinker.saved(model, 3, "one")


def test_names_of_v1(api: ApiDriver) -> None:
    adapter = api.adapter(OWNER)
    path = f"/v1/adapters/{adapter}/checkpoints"
    found = at_once(api, *((path, {"name": "one"}) for _ in range(4)))
    assert sorted(each.status_code for each in found) == [202, 409, 409, 409]
    answer_all(api)
    told = problem(api.post(path, OWNER, {"name": "one"}), 409, "name-taken")
    assert "'one'" in told["detail"] and "overwrite" in told["detail"]
    first = api.store.queries.checkpoints(OWNER)[0].id
    second = api.complete(path, OWNER, {"name": "one", "overwrite": True})["result"]["checkpoint_id"]
    assert api.post(f"/v1/adapters/{adapter}/load", OWNER, {"checkpoint": first}).status_code == 404
    assert api.post(f"/v1/adapters/{adapter}/load", OWNER, {"checkpoint": second}).status_code == 202
    answer_all(api)
    for _ in range(2):
        api.complete(path, OWNER)
    api.store.check()


def test_the_rule_is_the_logs(api: ApiDriver) -> None:
    """Whoever appends, also in one transaction: names, and that a deleted checkpoint does not come back."""
    store, adapter = api.store, api.adapter(OWNER)

    def save(checkpoint: str, *replaces: str) -> kinds.NewEvent:
        event = kinds.SaveRequested(checkpoint=checkpoint, name="one", replaces=replaces)
        return kinds.NewEvent(event=event, tenant=OWNER, stream=f"adapter/{adapter}", adapter=adapter)

    with pytest.raises(NameTaken):
        store.append(save("ck_a"), save("ck_b"))
    store.append(save("ck_a"), save("ck_b", "ck_a"))
    with pytest.raises(NameTaken):
        store.append(save("ck_c", "ck_a"))
    answer_all(api)

    def change(checkpoint: str, **how: Any) -> kinds.NewEvent:
        event = kinds.CheckpointChanged(checkpoint=checkpoint, **{"expires_us": None, "published": True} | how)
        return kinds.NewEvent(event=event, tenant=OWNER, stream=f"tenant/{OWNER}")

    for deleted in ("ck_a", "ck_b"):
        store.append(change(deleted, deleted=True))
        store.append(change(deleted, deleted=True))
        with pytest.raises(NotFound):
            store.append(change(deleted))
    store.check()
