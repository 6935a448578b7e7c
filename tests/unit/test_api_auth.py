"""Keys, the local mode without them, and the limits of both."""

from collections.abc import Iterator

import msgspec
import pytest

from tests.support.api_driver import MODEL, ApiDriver, create_key, lead, problem, record_environment, revoke_key
from tinkerbell.api import auth, views
from tinkerbell.api.app import create_app
from tinkerbell.config import Settings
from tinkerbell.errors import InvalidRequest
from tinkerbell.events import kinds
from tinkerbell.events.store import EventStore


@pytest.fixture
def api(settings: Settings, sqlite_store: EventStore) -> Iterator[ApiDriver]:
    record_environment(sqlite_store)
    with ApiDriver(msgspec.structs.replace(settings, auth="keys"), sqlite_store) as driver:
        yield driver


def test_a_key_says_whose_request_it_is(api: ApiDriver) -> None:
    future = api.submit("/v1/adapters", "alice")
    recorded = api.store.get(future["id"])
    assert recorded is not None
    assert (recorded.tenant, recorded.actor) == ("alice", api.key("alice").split("-")[1])
    assert api.get("/v1/usage", headers={"X-API-Key": api.key("alice")}).status_code == 200
    assert api.get("/v1/usage", headers={"Authorization": f"bearer {api.key('alice')}"}).status_code == 200


def test_what_is_no_key_opens_nothing(api: ApiDriver) -> None:
    key = api.key("alice")
    other = create_key(api.store, "bob")
    _, key_id, secret = key.split("-", 2)
    mixed = f"tb-{key_id}-{other.split('-', 2)[2]}"
    swapped = f"tb-{key_id}-{secret[:-1]}{'A' if secret[-1] != 'A' else 'B'}"
    for text in (
        "",
        "x",
        key[3:],
        key + "x",
        mixed,
        swapped,
        f"tb-k_0000-{secret}",
        key.upper(),
        f"{key}\t{key}",
        "tb-k_é-é",
    ):
        answered = api.get("/v1/usage", headers={"X-API-Key": text.encode("latin-1")})
        problem(answered, 401, "unauthorized")
        assert answered.headers["www-authenticate"] == "Bearer"
    problem(api.get("/v1/usage", headers={"Authorization": f"Basic {key}"}), 401, "unauthorized")


def test_the_key_is_asked_for_before_the_body_is_read(api: ApiDriver) -> None:
    problem(api.call("POST", "/v1/adapters", content=b"["), 401, "unauthorized")
    problem(api.get("/v1/futures/99999"), 401, "unauthorized")


def test_a_revoked_key_is_closed_when_the_cache_has_forgotten_it(
    api: ApiDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "CACHE_TTL_S", 0.0)
    assert api.get("/v1/usage", "alice").status_code == 200
    revoke_key(api.store, "alice", api.key("alice"))
    problem(api.get("/v1/usage", "alice"), 401, "unauthorized")


def test_only_admins_see_all_tenants(api: ApiDriver) -> None:
    api.submit("/v1/adapters", "alice")
    for path in ("/v1/queue", "/v1/usage"):
        problem(api.get(f"{path}?all_tenants=true", "alice"), 403, "forbidden")
    lines = api.get("/v1/queue?all_tenants=true", "root").json()["tenants"]
    assert {line["tenant"]: line["num_pending"] for line in lines} == {"alice": 1, "root": 0}


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/schema", "/schema/openapi.json"])
def test_public_routes_need_no_key(api: ApiDriver, path: str) -> None:
    lead(api.store)
    assert api.get(path, headers={"host": "elsewhere.example"}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "127.8.9.1", "[::1]:8080", "[::1]"])
def test_without_keys_the_local_user_is_served(settings: Settings, sqlite_store: EventStore, host: str) -> None:
    with ApiDriver(settings, sqlite_store) as api:
        (line,) = api.get("/v1/queue", headers={"host": host}).json()["tenants"]
        assert line["tenant"] == "local"


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:8080", "192.168.0.7", "0.0.0.0", "[::2]:80", "127.0.0.1.nip.io"]
)
def test_without_keys_foreign_names_are_refused(settings: Settings, sqlite_store: EventStore, host: str) -> None:
    with ApiDriver(settings, sqlite_store) as api:
        problem(api.get("/v1/queue", headers={"host": host}), 403, "forbidden")


@pytest.mark.parametrize("host", ["", "localhost:x", "localhost:99999", "a b", "[::1", "a/b", "user@localhost"])
def test_a_host_that_is_none(api: ApiDriver, host: str) -> None:
    problem(api.get("/v1/queue", "alice", headers={"host": host}), 400, "invalid-request")
    assert api.get("/nowhere", headers={"host": host}).status_code in (400, 404)


def test_the_first_key_ends_the_local_mode(
    settings: Settings, sqlite_store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "CACHE_TTL_S", 0.0)
    with ApiDriver(settings, sqlite_store) as api:
        assert api.get("/v1/queue").status_code == 200
        key = api.key("alice")
        problem(api.get("/v1/queue"), 401, "unauthorized")
        assert api.get("/v1/queue", "alice").status_code == 200
        revoke_key(sqlite_store, "alice", key)
        problem(api.get("/v1/queue"), 401, "unauthorized")


def test_beyond_loopback_keys_are_needed(settings: Settings, sqlite_store: EventStore) -> None:
    public = msgspec.structs.replace(settings, host="0.0.0.0")
    with ApiDriver(public, sqlite_store) as api:
        problem(api.get("/v1/queue"), 401, "unauthorized")
    with pytest.raises(InvalidRequest, match="loopback only"):
        create_app(msgspec.structs.replace(public, auth="off"), sqlite_store)


def test_directories_of_the_server_are_named_on_its_own_machine_only(
    settings: Settings, sqlite_store: EventStore
) -> None:
    model = msgspec.structs.replace(MODEL, tokenizer="/srv/models/small")
    record_environment(sqlite_store, model)
    with ApiDriver(settings, sqlite_store) as api:
        assert api.get("/v1/models").json()[0]["tokenizer"] == "/srv/models/small"
    with ApiDriver(msgspec.structs.replace(settings, host="0.0.0.0"), sqlite_store) as api:
        api.key("alice")
        assert api.get("/v1/models", "alice").json()[0]["tokenizer"] == ""


def test_auth_off_ignores_keys(settings: Settings, sqlite_store: EventStore) -> None:
    create_key(sqlite_store, "alice")
    with ApiDriver(msgspec.structs.replace(settings, auth="off"), sqlite_store) as api:
        (line,) = api.get("/v1/queue").json()["tenants"]
        assert line["tenant"] == "local"


def test_the_hash_of_a_key_never_leaves(api: ApiDriver) -> None:
    api.key("alice")
    (created,) = api.store.read(tenant="alice", types=["key.created"])
    assert isinstance(created.event, kinds.KeyCreated)
    view = views.log_event(created)
    assert created.event.key_hash not in msgspec.json.encode(view).decode()
    assert view.data["key_id"] == created.event.key_id


@pytest.mark.parametrize("header", auth.FORWARDED)
def test_without_keys_nobody_is_served_through_a_proxy(
    settings: Settings, sqlite_store: EventStore, header: str
) -> None:
    with ApiDriver(settings, sqlite_store) as api:
        refused = problem(api.get("/v1/usage", headers={header: "203.0.113.7"}), 403, "forbidden")
        assert "came through a proxy; make a key" in refused["detail"]
        assert api.get("/healthz", headers={header: "203.0.113.7"}).status_code == 200
    with ApiDriver(msgspec.structs.replace(settings, auth="keys"), sqlite_store) as api:
        assert api.get("/v1/usage", "alice", headers={header: "203.0.113.7"}).status_code == 200
