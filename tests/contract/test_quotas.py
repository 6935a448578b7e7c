"""Limits of what a tenant may have: in the transaction that appends, for every kind of thing, whoever asks at once."""

import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any, get_args

import msgspec
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations

from tests.support import log
from tests.support.api_driver import MODEL, ApiDriver, problem, record_environment
from tests.support.tinker_driver import OWNER, Tinker
from tinkerbell.config import Limits, Settings
from tinkerbell.errors import QuotaExceeded, TinkerbellError, TooManyRequests
from tinkerbell.events import kinds, quotas, schema
from tinkerbell.events.engine import make_engine
from tinkerbell.events.kinds import AnyEvent, NewEvent
from tinkerbell.events.quotas import BYTES_PER_PARAMETER, NAMES, Amounts
from tinkerbell.events.store import EventStore
from tinkerbell.types import LoraConfig, SamplingParams

TENANT = "alice"
MORE = 3
"""Of what a limit allows, are asked for at once."""


def of_tenant(event: AnyEvent, adapter: str | None = None, **more: Any) -> NewEvent:
    stream = f"tenant/{TENANT}" if adapter is None else f"adapter/{adapter}"
    return NewEvent(event=event, tenant=TENANT, stream=stream, adapter=adapter, **more)


def add_lora(adapter: str, num_parameters: int = 10) -> NewEvent:
    event = kinds.AddLoraRequested(base_model="fake", lora=LoraConfig(rank=4), seed=7, num_parameters=num_parameters)
    return of_tenant(event, adapter)


def sample(max_tokens: int = 4, num_samples: int = 2) -> NewEvent:
    params = SamplingParams(max_tokens=max_tokens, num_samples=num_samples)
    return of_tenant(kinds.SampleRequested(params=params, num_tokens=2), body=kinds.SampleBody(prompt=log.ints(1, 2)))


def configure(store: EventStore, **limits: int) -> None:
    store.append(of_tenant(kinds.TenantConfigured(**limits)))  # type: ignore[arg-type]


def used(store: EventStore) -> Amounts:
    return store.queries.holding(TENANT, Limits()).used


@pytest.fixture
def stores(database_settings: Settings) -> Iterator[list[EventStore]]:
    """Two, as of two processes; with a ready adapter and a session."""
    opened = [EventStore.open(database_settings) for _ in range(2)]
    (made,) = opened[0].append(add_lora("ad_one"))
    opened[0].append(log.add_lora_completed(made))
    opened[0].append(of_tenant(kinds.SessionStarted(session="se_one", client="test")))
    yield opened
    opened[0].check()
    for store in opened:
        store.close()


MAKERS: dict[str, tuple[Callable[[int], NewEvent], int]] = {
    "pending_requests": (lambda n: of_tenant(kinds.OptimStepRequested(adam=log.AdamParams()), "ad_one"), 1),
    "pending_tokens": (lambda n: sample(), 10),
    "adapters": (lambda n: add_lora(f"ad_{n}x"), 1),
    "adapter_bytes": (lambda n: add_lora(f"se_one:sample:{n}", 7), 7 * BYTES_PER_PARAMETER),
    "sessions": (lambda n: of_tenant(kinds.SessionStarted(session=f"se_{n}x", client="test")), 1),
    "samplers": (lambda n: of_tenant(kinds.SamplerCreated(sampler=f"se_one:sample:{n}", session="se_one")), 1),
    "checkpoints": (lambda n: of_tenant(kinds.SaveRequested(checkpoint=f"ck_{n}"), "ad_one"), 1),
    "stored_bytes": (lambda n: of_tenant(kinds.SamplerJoined(sampler="se_one:sample:0")), 554),
}
"""What is limited -> an event that makes some of it, and how much."""


def test_everything_limited_is_tried() -> None:
    assert set(MAKERS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_limit_is_passed_by_asking_at_once(stores: list[EventStore], name: str) -> None:
    make, amount = MAKERS[name]
    before = getattr(used(stores[0]), name)
    if name == "stored_bytes":
        configure(stores[0], **{f"max_{name}": 2**40})
        before = getattr(used(stores[0]), name)
    # What sets the limit is stored itself.
    slack = 600 if name == "stored_bytes" else 0
    configure(stores[0], **{f"max_{name}": before + slack + MORE * amount})
    refusals: list[TinkerbellError] = []

    def ask(store: EventStore, first: int) -> None:
        futures = [store.submit(make(first + number)) for number in range(2 * MORE)]
        for future in futures:
            try:
                future.result()
            except (QuotaExceeded, TooManyRequests) as exc:
                refusals.append(exc)

    threads = [threading.Thread(target=ask, args=(store, 100 * at)) for at, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holding = stores[0].queries.holding(TENANT, Limits())
    assert getattr(holding.used, name) <= getattr(holding.limits, name)
    assert getattr(holding.used, name) + amount > getattr(holding.limits, name)
    assert refusals
    for refused in refusals:
        assert refused.extra["quota"] == name
        assert f"{refused.extra['limit']:,}" in refused.detail
        assert refused.status == (429 if name.startswith("pending") else 413)


def test_every_kind_of_event_that_a_tenant_makes_is_bounded(stores: list[EventStore]) -> None:
    """A new kind is; one that shall not be has to say why, here too."""
    free = {
        *("remove_lora.requested", "sample.cancelled", "session.heard", "session.ended", "key.revoked"),
        *("key.created", "tenant.configured", "tenant.erased", "bulk.compacted", "checkpoint.written"),
        *("batch.planned", "batch.ran", "batch.lost", "environment.recorded", "lease.granted", "log.sealed"),
    }
    assert {kinds.type_of(cls) for cls in quotas.FREE} == free
    store = stores[0]
    store.append(sample())
    configure(store, max_stored_bytes=1)
    tried = set()
    for type_, (event, body) in log.examples().items():
        if isinstance(event, kinds.Result) or type_ in free:
            continue
        adapter = None if not isinstance(event, kinds.Request) or isinstance(event, kinds.SampleRequested) else "ad_one"
        if isinstance(event, kinds.AddLoraRequested | kinds.CheckpointCopied):
            adapter = "ad_new"
        if isinstance(event, kinds.CheckpointChanged):
            store.append(of_tenant(event))  # deleting makes room
            event = msgspec.structs.replace(event, deleted=False)
        with pytest.raises(QuotaExceeded, match="stored bytes"):
            store.append(of_tenant(event, adapter, body=body))
        tried.add(type(event))
    results = {cls for cls in get_args(kinds.AnyEvent) if issubclass(cls, kinds.Result)}
    assert tried == set(get_args(kinds.AnyEvent)) - results - set(quotas.FREE)


def test_what_ends_makes_room(stores: list[EventStore]) -> None:
    store = stores[0]
    configure(store, max_pending_requests=1, max_adapters=2, max_sessions=1, max_checkpoints=1)
    (made,) = store.append(add_lora("ad_two"))
    assert used(store) == msgspec.structs.replace(
        used(store), pending_requests=1, adapters=2, adapter_bytes=(12 + 10) * BYTES_PER_PARAMETER, sessions=1
    )
    with pytest.raises(TooManyRequests, match="1 of 1 requests pending"):
        store.append(sample())
    store.append(log.failed(made))
    with pytest.raises(QuotaExceeded, match="1 of 1 open sessions"):
        store.append(of_tenant(kinds.SessionStarted(session="se_two", client="test")))
    store.append(of_tenant(kinds.SessionEnded(session="se_one", reason="done")))
    store.append(of_tenant(kinds.SessionStarted(session="se_two", client="test")))
    (saving,) = store.append(of_tenant(kinds.SaveRequested(checkpoint="ck_one"), "ad_one"))
    store.append(log.save_completed(saving))
    with pytest.raises(QuotaExceeded, match="1 of 1 checkpoints"):
        store.append(of_tenant(kinds.SaveRequested(checkpoint="ck_two"), "ad_one"))
    store.append(
        of_tenant(kinds.CheckpointChanged(checkpoint="ck_one", expires_us=None, published=False, deleted=True))
    )
    store.append(of_tenant(kinds.SaveRequested(checkpoint="ck_two"), "ad_one"))


def test_a_sample_counts_with_all_it_may_become(stores: list[EventStore]) -> None:
    store = stores[0]
    configure(store, max_pending_tokens=100)
    with pytest.raises(QuotaExceeded, match=r"102 tokens .* limit is 100"):
        store.append(sample(max_tokens=50))
    (recorded,) = store.append(sample(max_tokens=48))
    assert used(store).pending_tokens == 98
    with pytest.raises(TooManyRequests, match="98 of 100 tokens"):
        store.append(sample(max_tokens=1))
    store.append(log.failed(recorded))
    assert used(store).pending_tokens == 0


def test_both_protocols_say_what_is_used_of_what(settings: Settings, sqlite_store: EventStore) -> None:
    per_rank = dict.fromkeys(MODEL.targets, 1000)
    record_environment(sqlite_store, msgspec.structs.replace(MODEL, parameters_per_rank=per_rank))
    limits = kinds.TenantConfigured(max_sessions=1, max_adapter_bytes=1_000_000, max_checkpoints=1)
    sqlite_store.append(NewEvent(event=limits, tenant=OWNER, stream=f"tenant/{OWNER}"))
    with ApiDriver(settings, sqlite_store) as api:
        tinker = Tinker(api)
        session = tinker.session()
        refused = tinker.post("create_session", sdk_version="0.38.0", tags=[])
        assert refused.status_code == 413
        assert "1 of 1 open sessions" in refused.json()["detail"]
        headers = {"Authorization": f"Bearer {api.key(OWNER)}"}
        huge = api.call("POST", "/v1/adapters", json={"lora": {"rank": 1024}}, headers=headers)
        assert problem(huge, 413, "quota-exceeded")["quota"] == "adapter_bytes"
        model = tinker.model(session)
        assert tinker.saved(model, 1)
        assert tinker.post("save_weights", model_id=model, seq_id=2, path="two").status_code == 413
        shown = api.call("GET", "/v1/limits", headers=headers).json()["quotas"]
        assert shown["sessions"] == {"used": 1, "limit": 1}
        assert shown["adapters"] == {"used": 1, "limit": Limits().max_adapters}
        assert shown["adapter_bytes"]["used"] > 0
        assert set(shown) == set(NAMES)


def test_an_upgrade_counts_what_is_there(stores: list[EventStore], database_settings: Settings) -> None:
    store = stores[0]
    store.append(sample(max_tokens=5))
    (saving,) = store.append(of_tenant(kinds.SaveRequested(checkpoint="ck_one"), "ad_one"))
    store.append(log.save_completed(saving))
    before = used(store)
    (path,) = schema.migrations_dir().glob("versions/*_quotas.py")
    spec = importlib.util.spec_from_file_location("quotas_migration", path)
    assert spec is not None and spec.loader is not None
    migration = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(migration)
    engine = make_engine(database_settings.url, role="writer")
    with engine.begin() as connection:
        for statement in ("DELETE FROM lines", "DELETE FROM stored", "UPDATE futures SET reserved_tokens = 0"):
            connection.exec_driver_sql(statement)
        with Operations.context(MigrationContext.configure(connection)):
            migration._fill()
    engine.dispose()
    assert used(store) == before
