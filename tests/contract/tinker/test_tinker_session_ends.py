"""The end of sessions: by their own word, by silence, beside other requests."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest

from tests.support.api_driver import ApiDriver, answer, record_environment
from tests.support.tinker_driver import LORA, OWNER, STRANGER, Tinker
from tinkerbell.config import Settings
from tinkerbell.errors import NotFound, SessionOver
from tinkerbell.events import kinds, sessions
from tinkerbell.events.kinds import NewEvent, Recorded
from tinkerbell.events.leases import Lease
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.session_expiry import SessionClearing, SessionExpiry

EXPIRY_S = 3600.0
PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
SUCCESS = {"type": "success"}


def finish(tinker: Tinker, session: str) -> None:
    assert tinker.post(f"sessions/{session}/finish", reason=SUCCESS).status_code == 204


def sampler_of(tinker: Tinker, session: str, number: int = 0, **more: Any) -> str:
    asked = more or {"base_model": "tiny"}
    made = tinker.ok("create_sampling_session", session_id=session, sampling_session_seq_id=number, **asked)
    sampler: str = made["sampling_session_id"]
    return sampler


def sample(tinker: Tinker, sampler: str, seq: int = 0) -> httpx.Response:
    asked = {"prompt": PROMPT, "sampling_params": {"max_tokens": 2}, "num_samples": 1}
    return tinker.post("asample", sampling_session_id=sampler, seq_id=seq, **asked)


def answer_all(store: EventStore) -> None:
    for row in store.queries.pending():
        answer(store, row.id)


def living(store: EventStore, session: str) -> list[str]:
    return [row.id for row in store.queries.living_adapters(OWNER, session)]


def removals(store: EventStore) -> list[Recorded]:
    return store.read(types=["remove_lora.requested"])


PassTime = Callable[[float], None]


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> PassTime:
    """Puts the clock forward by so many seconds, for all of this process."""
    real, ahead_ns = time.time_ns, 0
    monkeypatch.setattr(time, "time_ns", lambda: real() + ahead_ns)

    def put_forward(seconds: float) -> None:
        nonlocal ahead_ns
        ahead_ns += round(seconds * 1e9)

    return put_forward


@pytest.fixture
def hasty(settings: Settings, store: EventStore) -> Iterator[Tinker]:
    """Of a server whose sessions expire soon."""
    record_environment(store)
    with ApiDriver(msgspec.structs.replace(settings, auth="keys", session_expiry_s=EXPIRY_S), store) as api:
        yield Tinker(api)


@pytest.fixture
def lease(store: EventStore) -> Lease:
    found = store.acquire_lease("scheduler", "here", 100 * EXPIRY_S)
    assert found is not None
    return found


@pytest.fixture
def expiry(store: EventStore, lease: Lease) -> SessionExpiry:
    """Of a leader that has listened for long enough."""
    found = SessionExpiry(store, lease, EXPIRY_S)
    found._begun_s -= EXPIRY_S
    return found


def test_silence_ends_a_session_and_keeps_what_it_saved(
    hasty: Tinker, expiry: SessionExpiry, pass_time: PassTime
) -> None:
    store = hasty.api.store
    silent, speaks, works, waits, ended = (hasty.session() for _ in range(5))
    models = {session: hasty.model(session) for session in (silent, works, waits)}
    path = hasty.saved(models[silent], 1)
    stepped = hasty.ok("optim_step", model_id=models[waits], seq_id=1, adam_params={"learning_rate": 0.1})
    assert hasty.post(f"sessions/{ended}/finish", reason={"type": "success"}).status_code == 204
    pass_time(EXPIRY_S)
    hasty.saved(models[works], 1)
    assert hasty.post("session_heartbeat", session_id=speaks).status_code == 200
    num_events = store.head()
    assert hasty.post("session_heartbeat", session_id=speaks).status_code == 200
    assert store.head() == num_events, "what is known already is not written again"

    expiry.do(EXPIRY_S)
    ends = [(each.event.session, each.event.reason) for each in store.read(types=["session.ended"])]
    assert ends == [(ended, "success"), (silent, "expired")]
    (removal,) = store.read(types=["remove_lora.requested"])
    assert removal.adapter == models[silent]
    answer(store, removal.position)
    expiry.do(EXPIRY_S)
    assert len(store.read(types=["session.ended"])) == 2

    assert hasty.post("session_heartbeat", session_id=silent).status_code == 410
    assert hasty.post("session_heartbeat", session_id=speaks).status_code == 200
    status = {each["session_id"]: each["status"] for each in hasty.ok("sessions/search")["sessions"]}
    assert status[silent] == {"type": "cancelled", "detail": f"Nothing was heard of it for {EXPIRY_S:g} s."}
    assert status[works] == {"type": "active"}
    refused = hasty.post("create_model", session_id=silent, model_seq_id=1, base_model="tiny", lora_config=LORA)
    assert refused.status_code == 400 and "start another one" in refused.text
    gone = hasty.post("optim_step", model_id=models[silent], seq_id=2, adam_params={})
    assert gone.status_code == 404 and "from a checkpoint in another session" in gone.text
    assert hasty.ok("weights_info", tinker_path=path)["base_model"] == "tiny"
    sampler = hasty.ok(
        "create_sampling_session", session_id=hasty.session(), sampling_session_seq_id=0, model_path=path
    )
    assert sampler["sampling_session_id"]
    answer(store, int(stepped["request_id"]))
    store.check()


def test_a_new_leader_listens_before_it_ends_sessions(hasty: Tinker, store: EventStore, pass_time: PassTime) -> None:
    session = hasty.session()
    pass_time(EXPIRY_S)
    lease = store.acquire_lease("scheduler", "here", 100 * EXPIRY_S)
    assert lease is not None
    expiry = SessionExpiry(store, lease, EXPIRY_S)
    expiry.do(EXPIRY_S)
    row = store.queries.session(OWNER, session)
    assert row is not None and row.ended_us is None


def test_a_leader_that_was_replaced_ends_nothing(hasty: Tinker, expiry: SessionExpiry, pass_time: PassTime) -> None:
    session, store = hasty.session(), hasty.api.store
    pass_time(EXPIRY_S)
    held = expiry._lease
    store.release_lease(held)
    assert store.acquire_lease("scheduler", "there", 100 * EXPIRY_S) is not None
    expiry.do(EXPIRY_S)
    row = store.queries.session(OWNER, session)
    assert row is not None and row.ended_us is None


def test_samples_of_the_base_model_keep_a_session_alive(
    hasty: Tinker, expiry: SessionExpiry, pass_time: PassTime
) -> None:
    store = hasty.api.store
    samples, waits, silent = (hasty.session() for _ in range(3))
    of_it = {session: sampler_of(hasty, session) for session in (samples, waits, silent)}
    assert sample(hasty, of_it[waits]).status_code == 200
    pass_time(EXPIRY_S)
    done = sample(hasty, of_it[samples]).json()
    answer(store, int(done["request_id"]))
    expiry.do(EXPIRY_S)
    assert [each.event.session for each in store.read(types=["session.ended"])] == [silent]
    answer_all(store)
    pass_time(EXPIRY_S)
    expiry.do(EXPIRY_S)
    assert {each.event.session for each in store.read(types=["session.ended"])} == {samples, waits, silent}


def test_who_speaks_up_while_others_are_ended_is_heard(
    hasty: Tinker, expiry: SessionExpiry, monkeypatch: pytest.MonkeyPatch, pass_time: PassTime
) -> None:
    store = hasty.api.store
    first, second = hasty.session(), hasty.session()
    pass_time(EXPIRY_S)
    end = sessions.end

    def slow(*args: Any, **envelope: Any) -> int:
        assert hasty.post("session_heartbeat", session_id=second).status_code == 200
        return end(*args, **envelope)

    monkeypatch.setattr("tinkerbell.scheduler.session_expiry.end", slow)
    expiry.do(EXPIRY_S)
    assert [each.event.session for each in store.read(types=["session.ended"])] == [first]
    assert hasty.post("session_heartbeat", session_id=second).status_code == 200


def test_of_many_heartbeats_at_once_one_is_written(hasty: Tinker, pass_time: PassTime) -> None:
    session, api = hasty.session(), hasty.api
    pass_time(EXPIRY_S / 4)
    headers = {"X-API-Key": f"tml-{api.key(OWNER)}"}

    async def all_at_once() -> list[httpx.Response]:
        route, body = "/api/v1/session_heartbeat", {"session_id": session}
        return await asyncio.gather(*(api.acall("POST", route, json=body, headers=headers) for _ in range(20)))

    assert [each.status_code for each in api.run(all_at_once())] == [200] * 20
    heard = api.store.read(types=["session.heard"])
    assert 1 <= len(heard) <= 2, "a second one where the first was written before the last came"


def test_an_ended_session_makes_nothing_more(tinker: Tinker) -> None:
    store, session = tinker.api.store, tinker.session()
    path = tinker.saved(tinker.model(), 1, "mine", route="save_weights_for_sampler")
    model = tinker.model(session)
    used, unused, base = (
        sampler_of(tinker, session, number, **more)
        for number, more in enumerate(({"model_path": path}, {"model_path": path}, {}))
    )
    first = sample(tinker, used).json()
    answer_all(store)
    finish(tinker, session)
    answer_all(store)
    assert not living(store, session)
    assert sample(tinker, used).json() == first, "a retry of what was accepted"
    head = store.head()
    refused = [
        sample(tinker, used, 1),
        sample(tinker, unused),
        sample(tinker, base),
        tinker.post("join_sampling_session", sampling_session_id=base),
        tinker.post("create_sampling_session", session_id=session, sampling_session_seq_id=7, model_path=path),
        tinker.post("create_model", session_id=session, model_seq_id=7, base_model="tiny", lora_config=LORA),
        tinker.post("load_weights", session_id=session, model_seq_id=7, path=path, optimizer=False),
        tinker.post("copy_weights", session_id=session, model_seq_id=7, source_path=path),
        tinker.post("save_weights_for_sampler", model_id=model, seq_id=3, sampling_session_seq_id=8),
    ]
    assert [each.status_code for each in refused] == [400] * len(refused), [each.text for each in refused]
    assert all("has ended" in each.text for each in refused)
    finish(tinker, session)
    assert store.head() == head
    store.check()


def test_the_log_itself_refuses_what_a_session_would_make_after_its_end(store: EventStore) -> None:
    def event(made: kinds.AnyEvent, tenant: str = OWNER, **more: Any) -> NewEvent:
        return NewEvent(event=made, tenant=tenant, stream=f"tenant/{tenant}", **more)

    session = "se_" + "a" * 20
    ended = event(kinds.SessionEnded(session=session, reason="success"))
    joined = event(kinds.SamplerJoined(sampler="s"), session=session)
    with pytest.raises(NotFound, match="no session"):
        store.append(joined)
    store.append(event(kinds.SessionStarted(session=session, client="c")), joined)
    with pytest.raises(NotFound, match="no session"):
        store.append(event(kinds.SamplerJoined(sampler="s"), STRANGER, session=session))
    head = store.head()
    with pytest.raises(SessionOver):
        store.append(ended, joined)
    assert store.head() == head
    store.append(joined, ended)
    with pytest.raises(SessionOver):
        store.append(joined)
    store.check()


def test_what_is_made_beside_the_end_of_its_session_leaves_with_it(tinker: Tinker) -> None:
    store, api = tinker.api.store, tinker.api
    headers = {"X-API-Key": f"tml-{api.key(OWNER)}"}
    made = refused = 0

    async def race(session: str) -> list[httpx.Response]:
        body = {"session_id": session, "base_model": "tiny", "lora_config": LORA}
        creates = [
            api.acall("POST", "/api/v1/create_model", json={**body, "model_seq_id": number}, headers=headers)
            for number in range(4)
        ]
        end = api.acall("POST", f"/api/v1/sessions/{session}/finish", json={"reason": SUCCESS}, headers=headers)
        return await asyncio.gather(*creates[:2], end, *creates[2:])

    for _ in range(20):
        session = tinker.session()
        codes = [each.status_code for each in api.run(race(session))]
        assert codes.pop(2) == 204 and set(codes) <= {200, 400}, codes
        answer_all(store)
        assert not living(store, session)
        made, refused = made + codes.count(200), refused + codes.count(400)
    assert made + refused == 80
    ends = {each.event.session: each.position for each in store.read(types=["session.ended"])}
    asked = store.read(types=["add_lora.requested"])
    assert len(asked) == made == len(removals(store))
    assert all(each.position < ends[each.adapter.partition(":")[0]] for each in asked)
    store.check()


def test_a_session_ends_although_its_adapter_is_removed_meanwhile(
    tinker: Tinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tinker.api.store
    session = tinker.session()
    models = [tinker.model(session, number) for number in range(2)]
    attempts = store.queries.attempts

    def slow(tenant: str, adapter: str, kind: str) -> tuple[int, bool]:
        found = attempts(tenant, adapter, kind)
        if adapter == models[0]:
            removal = kinds.RemoveLoraRequested()
            (asked,) = store.append(NewEvent(event=removal, tenant=OWNER, stream=f"adapter/{adapter}", adapter=adapter))
            answer(store, asked.position)
        return found

    monkeypatch.setattr(store.queries, "attempts", slow)
    finish(tinker, session)
    answer_all(store)
    assert not living(store, session) and [each.adapter for each in removals(store)] == models


def test_a_removal_that_failed_or_was_never_asked_for_is_asked_again(tinker: Tinker, lease: Lease) -> None:
    store, clearing = tinker.api.store, SessionClearing(tinker.api.store, lease)
    session, other = tinker.session(), tinker.session()
    model, stays = tinker.model(session), tinker.model(other)
    finish(tinker, session)
    (first,) = removals(store)
    clearing.do(3600.0)
    assert removals(store) == [first], "it is on its way"
    answer(store, first.position, kinds.RemoveLoraFailed(category="server", code="poison", message="x"))
    clearing.do(3600.0)
    (_, again) = removals(store)
    answer(store, again.position)
    clearing.do(3600.0)
    assert [each.adapter for each in removals(store)] == [model, model]

    # As if the server had died in between.
    end = kinds.SessionEnded(session=other, reason="success")
    store.append(NewEvent(event=end, tenant=OWNER, stream=f"tenant/{OWNER}"))
    clearing.do(3600.0)
    assert removals(store)[-1].adapter == stays
    answer_all(store)
    assert not store.queries.uncleared_sessions()
    store.check()
