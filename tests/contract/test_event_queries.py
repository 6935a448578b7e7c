"""What the projections answer, scoped to a tenant. On SQLite and Postgres."""

import pytest
import sqlalchemy as sa

from tests.support import log
from tests.support.life import live
from tinkerbell.config import Settings
from tinkerbell.events import kinds
from tinkerbell.events.engine import make_engine
from tinkerbell.events.kinds import NewEvent, Recorded
from tinkerbell.events.rows import FutureRow, TenantRow
from tinkerbell.events.store import EventStore
from tinkerbell.events.views import VIEWS
from tinkerbell.types import LoraConfig


def test_futures_and_queues(store: EventStore) -> None:
    (added,) = store.append(log.add_lora())
    store.append(log.add_lora_completed(added))
    first, second = store.append(log.forward_backward(), log.sample())
    (bobs,) = store.append(log.sample(None, "bob"))
    q = store.queries
    row = q.future("alice", first.position)
    assert row == FutureRow(
        id=first.position,
        tenant="alice",
        adapter="ad_one",
        seq=1,
        kind="forward_backward",
        state="pending",
        num_tokens=3,
        result_position=None,
        cost_us=None,
        created_us=first.at_us,
        done_us=None,
    )
    assert q.future("bob", first.position) is None
    assert q.future("alice", 2) is None, "a result is no future"
    assert [r.id for r in q.pending()] == [first.position, second.position, bobs.position]
    assert [r.id for r in q.pending("alice")] == [first.position, second.position]
    assert q.pending_count("alice") == (2, 9) and q.pending_count("nobody") == (0, 0)
    assert (q.place("alice", first.position), q.place("alice", second.position)) == (0, 1)
    (done,) = store.append(log.forward_backward_completed(first, cost_us=70))
    row = q.future("alice", first.position)
    assert row is not None and (row.state, row.result_position, row.cost_us) == ("completed", done.position, 70)
    assert row.done_us == done.at_us
    assert q.place("alice", second.position) == 0
    assert q.pending_count("alice") == (1, 6)
    store.append(log.sample_completed(bobs), log.failed(second))
    row = q.future("alice", second.position)
    assert row is not None and row.state == "failed"
    assert q.recent_usage(0, ["alice", "bob"]) == {"alice": (70, 5), "bob": (0, 4)}
    assert q.recent_usage(0, ["bob"]) == {"bob": (0, 4)}
    assert q.recent_usage(done.at_us + 60_000_000, ["alice", "bob"]) == {}
    assert [(u.adapter, u.kind, u.num_requests, u.tokens_in, u.tokens_out, u.cost_us) for u in q.usage()] == [
        ("ad_one", "add_lora", 1, 0, 0, 0),
        ("ad_one", "forward_backward", 1, 3, 0, 70),
        ("ad_one", "sample", 1, 0, 0, 0),
        (None, "sample", 1, 2, 2, 0),
    ]
    assert q.usage("bob")[0].tenant == "bob" and len(q.usage("bob")) == 1
    assert q.tenants() == ["alice", "bob"]
    assert q.usage(after=("alice", "ad_one", "forward_backward"), limit=1) == q.usage()[2:3]
    assert q.served_us() == {"alice": 70, "bob": 0} and q.served_us("alice") == {"alice": 70}
    assert q.run_counts("alice", ["ad_one"]) == {"ad_one": (3, 1, 5, 70)}
    assert q.run_counts("bob", ["ad_one"]) == {"ad_one": (0, 0, 0, 0)}


def test_adapters_and_checkpoints(store: EventStore) -> None:
    live(store)
    q = store.queries
    row = q.adapter("alice", "ad_one")
    assert row is not None
    assert (row.state, row.step, row.next_seq, row.done_seq, row.last_loss) == ("ready", 1, 5, 3, 2.0)
    assert (row.lora, row.seed, row.name, row.num_parameters) == (LoraConfig(rank=4), 7, "mine", 12)
    assert q.adapter("bob", "ad_one") is None
    assert {a.id: a.state for a in q.adapters("bob")} == {"ad_bob": "removed", "ad_lost": "failed"}
    saved = q.checkpoint("alice", "ck_one")
    assert saved is not None and saved.kind == "save" and set(saved.blobs) == {"weights", "adapter_config", "optimizer"}
    assert q.checkpoint("bob", "ck_one") is None
    assert [c.id for c in q.checkpoints("alice")] == ["ck_one", "ck_copy"]
    assert [c.id for c in q.checkpoints("alice", "ad_one", kind=None)] == ["ck_one", "ck_rec"]
    assert q.checkpoints("alice", "ad_other") == []


def test_keys_tenants_and_environment(store: EventStore) -> None:
    assert store.queries.environment() is None
    assert store.queries.tenant("alice") == TenantRow(tenant="alice")
    live(store)
    q = store.queries
    key = q.key("k_one")
    assert key is not None and key.tenant == "alice" and key.revoked_us is not None and key.admin is False
    assert q.key("k_two") is None and q.keys("bob") == [] and q.keys() == [key]
    assert q.tenant("alice") == TenantRow(tenant="alice", weight=2.0, max_adapters=30)
    found = q.environment()
    assert found is not None and found.model == log.MODEL and q.environment() is found
    newer = kinds.EnvironmentRecorded(digest="00", executor="fake", exact=True, model=log.MODEL, facts={})
    store.append(log.system(newer))
    assert q.environment() == newer


def test_run_points(store: EventStore) -> None:
    (added,) = store.append(log.add_lora())
    store.append(log.add_lora_completed(added))

    def step(number: int, losses: list[float]) -> Recorded:
        for loss in losses:
            (asked,) = store.append(log.forward_backward())
            store.append(log.forward_backward_completed(asked, loss=loss))
        (asked,) = store.append(log.optim_step(learning_rate=number / 10))
        (done,) = store.append(log.optim_step_completed(asked, number))
        return done

    first = step(1, [6.0, 3.0])
    (asked,) = store.append(log.forward_backward())
    store.append(log.failed(asked))
    step(2, [1.5])
    points = store.queries.run_points("alice", "ad_one")
    assert [(p.step, p.learning_rate, p.loss_sum, p.num_tokens) for p in points] == [(1, 0.1, 9.0, 6), (2, 0.2, 1.5, 3)]
    assert (points[0].at_us, points[0].grad_norm, points[0].state_digest) == (first.at_us, 0.5, "d1")
    assert store.queries.run_points("alice", "ad_one", after_step=1) == points[1:]
    assert store.queries.run_points("alice", "ad_one", after_step=2) == []
    assert store.queries.run_points("alice", "ad_one", limit=1) == points[:1]
    assert store.queries.run_points("bob", "ad_one") == []
    # A load clears the gradient and takes the step count back.
    (trained,) = store.append(log.forward_backward())
    store.append(log.forward_backward_completed(trained, loss=100.0))
    (load,) = store.append(log.request(kinds.LoadRequested(checkpoint="ck_one")))
    store.append(log.result(kinds.LoadCompleted(checkpoint="ck_one", step=1, state_digest="d1"), load))
    step(2, [2.5])
    points = store.queries.run_points("alice", "ad_one")
    assert [(p.step, p.loss_sum) for p in points] == [(1, 9.0), (2, 1.5), (2, 2.5)]


@pytest.mark.parametrize("view", VIEWS)
def test_views_have_the_columns_that_are_documented(store: EventStore, database_settings: Settings, view: str) -> None:
    live(store)
    engine = make_engine(database_settings.url, role="reader")
    with engine.connect() as connection:
        names = set(sa.inspect(connection).get_view_names())
        result = connection.execute(sa.text(f"SELECT * FROM {view}"))
        assert list(result.keys()) == list(VIEWS[view].columns)
        assert result.first() is not None
    engine.dispose()
    assert names == set(VIEWS)


def test_the_bill_and_the_stuck_in_plain_sql(store: EventStore, database_settings: Settings) -> None:
    live(store)
    engine = make_engine(database_settings.url, role="reader")

    def ask(sql: str) -> list[tuple[object, ...]]:
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(sql))]

    bill = ask(
        "SELECT tenant, num_requests, tokens_in, tokens_out, accelerator_s, share FROM audit_costs ORDER BY tenant"
    )
    assert bill == [
        ("alice", 5, 5, 2, pytest.approx(0.0006), pytest.approx(2 / 3)),
        ("bob", 5, 2, 2, pytest.approx(0.0003), pytest.approx(1 / 3)),
    ]
    steps = ask(
        "SELECT adapter, seq, step, learning_rate, grad_norm, state_digest, batch, cost_us FROM audit_optim_steps"
    )
    assert steps == [("ad_one", 2, 1, 0.001, 0.5, "d1", None, 0)]
    assert ask("SELECT kind, adapter, seq, waits_for FROM audit_stuck") == [("forward_backward", "ad_one", 4, 0)]
    assert ask("SELECT id, state, busy_us, num_requests FROM audit_batches ORDER BY id") == [
        ("1.1", "ran", 900, 2),
        ("1.2", "lost", None, 0),
    ]
    assert ask("SELECT sum(accelerator_s) FROM audit_usage WHERE kind = 'forward_backward'") == [
        (pytest.approx(0.0009),)
    ]
    assert ask("SELECT count(*) FROM audit_events WHERE actor = 'k_test'")[0][0] == 11
    engine.dispose()


def test_a_tenant_is_listed_once_it_has_any_event(store: EventStore) -> None:
    event = kinds.KeyCreated(key_id="k_z", key_hash="00")
    store.append(NewEvent(event=event, tenant="zoe", stream="tenant/zoe"))
    assert store.queries.tenants() == ["zoe"]
