"""The scheduler with a real store and a real executor process: order, recovery, fencing, exactly one answer."""

import os
import random
import signal
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import pytest
import sqlalchemy as sa

from tests.support.owner import forge
from tests.support.waiting import AT_ONCE_S, PATIENCE_S, eventually
from tinkerbell.config import Settings
from tinkerbell.errors import NotFound, TinkerbellError
from tinkerbell.events import kinds, schema, tables
from tinkerbell.events.blobs import BlobStore
from tinkerbell.events.kinds import Body, ForwardBackwardBody, NewEvent, Recorded, SampleBody, kind_of
from tinkerbell.events.leases import Lease
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.service import SchedulerService
from tinkerbell.types import AdamParams, AdapterId, Datum, LoraConfig, LossSpec, SamplingParams

STEPS = 8


def ints(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def datum(generator: random.Random, length: int) -> Datum:
    tokens = [generator.randrange(1, 256) for _ in range(length + 1)]
    return Datum(ints(tokens[:-1]), ints(tokens[1:]), {})


@dataclass
class Asker:
    """A tenant with one adapter, straight at the store."""

    store: EventStore
    tenant: str
    adapter: AdapterId
    positions: list[int] = field(default_factory=list)

    def ask(self, event: kinds.AnyRequest, body: Body | None = None, *, base: bool = False) -> int:
        stream = f"tenant/{self.tenant}" if base else f"adapter/{self.adapter}"
        adapter = None if base else self.adapter
        new = NewEvent(event=event, tenant=self.tenant, stream=stream, adapter=adapter, body=body)
        (recorded,) = self.store.append(new)
        self.positions.append(recorded.position)
        return recorded.position

    def add_lora(self, seed: int = 1, rank: int = 2, checkpoint: str | None = None) -> int:
        lora = LoraConfig(rank=rank)
        event = kinds.AddLoraRequested(
            base_model="fake", lora=lora, seed=seed, checkpoint=checkpoint, with_optimizer=True
        )
        return self.ask(event)

    def train(self, data: list[Datum], kind: str = "forward_backward", chunk_tokens: int = 16) -> int:
        cls = kinds.ForwardBackwardRequested if kind == "forward_backward" else kinds.ForwardRequested
        tokens = sum(d.num_tokens for d in data)
        event = cls(loss=LossSpec(), num_datums=len(data), num_tokens=tokens, chunk_tokens=chunk_tokens)
        return self.ask(event, ForwardBackwardBody(data=data))

    def step(self) -> int:
        return self.ask(kinds.OptimStepRequested(adam=AdamParams(learning_rate=0.05)))

    def sample(self, seed: int | None = 7, *, base: bool = False, max_tokens: int = 8) -> int:
        event = kinds.SampleRequested(params=SamplingParams(max_tokens=max_tokens, seed=seed), num_tokens=3)
        return self.ask(event, SampleBody(prompt=ints([1, 2, 3])), base=base)

    def sample_many(self, num_samples: int, max_tokens: int) -> int:
        params = SamplingParams(max_tokens=max_tokens, seed=7, num_samples=num_samples, prompt_logprobs=True)
        return self.ask(kinds.SampleRequested(params=params, num_tokens=3), SampleBody(prompt=ints([1, 2, 3])))

    def cancel(self, position: int) -> None:
        event = kinds.SampleCancelled(request=position)
        self.store.append(NewEvent(event=event, tenant=self.tenant, stream=f"tenant/{self.tenant}"))

    def save(self, checkpoint: str) -> int:
        return self.ask(kinds.SaveRequested(checkpoint=checkpoint))

    def load(self, checkpoint: str) -> int:
        return self.ask(kinds.LoadRequested(checkpoint=checkpoint))

    def remove(self) -> int:
        return self.ask(kinds.RemoveLoraRequested())

    def answers(self, timeout_s: float = PATIENCE_S) -> list[Recorded]:
        """Results of everything asked so far, in the order of asking."""
        return [self.answer(position, timeout_s) for position in self.positions]

    def answer(self, position: int, timeout_s: float = PATIENCE_S) -> Recorded:
        deadline = time.monotonic() + timeout_s
        while True:
            row = self.store.queries.future(self.tenant, position)
            assert row is not None
            if row.result_position is not None:
                found = self.store.get(row.result_position)
                assert found is not None
                return found
            assert time.monotonic() < deadline, f"no answer to {row}"
            time.sleep(0.005)

    def digest(self) -> str | None:
        row = self.store.queries.adapter(self.tenant, self.adapter)
        assert row is not None
        return row.state_digest


@pytest.fixture
def server_settings(database_settings) -> Settings:
    return msgspec.structs.replace(
        database_settings,
        executor_options={"latency_us": "300"},
        batch_tokens=64,
        checkpoint_every_steps=3,
        lease_ttl_s=2.0,
    )


@pytest.fixture
def store(server_settings) -> Iterator[EventStore]:
    """Verified at the end of each test."""
    opened = EventStore.open(server_settings)
    yield opened
    try:
        opened.check()
    finally:
        opened.close()


@pytest.fixture
def serve(store, server_settings) -> Iterator[Callable[..., SchedulerService]]:
    services: list[SchedulerService] = []

    def start(**changes: object) -> SchedulerService:
        service = SchedulerService(store, msgspec.structs.replace(server_settings, **changes))
        services.append(service)
        service.start()
        return service

    yield start
    for service in services:
        service.stop()
        assert service.failed is None


on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what does not depend on the database."""


def ask_for_everything(store: EventStore, number: int) -> Asker:
    """A run of one tenant with every kind of request, never waiting for a result."""
    generator = random.Random(number)
    asker = Asker(store, f"t{number}", f"ad_{number}")
    asker.add_lora(seed=number, rank=1 + number)
    for step in range(STEPS):
        # Several chunks, and a datum that is longer than a chunk.
        asker.train([datum(generator, generator.randrange(2, 24)) for _ in range(4)])
        asker.train([datum(generator, 5)])
        if step == 3:
            asker.save(f"ck_between_{number}")
        asker.step()
        if step % 3 == 0:
            asker.sample(seed=step)
            asker.sample(seed=step + 100)
            asker.sample(seed=step, base=True)
        if step == 5:
            asker.save(f"ck_{number}")
        if step == 6:
            asker.load(f"ck_{number}")
        asker.train([datum(generator, 6)], kind="forward")
        asker.step() if step == 2 else None
    return asker


def outcome(recorded: Recorded, store: EventStore) -> object:
    """What must not depend on company, interruptions or positions."""
    event, body = recorded.event, store.body(recorded)
    match event:
        case kinds.ForwardCompleted() | kinds.ForwardBackwardCompleted():
            return kind_of(event), event.loss, body
        case kinds.OptimStepCompleted():
            return "optim_step", event.step, event.grad_norm, event.state_digest
        case kinds.SampleCompleted():
            return "sample", event.step, body
        case kinds.Failed():
            return "failed", event.category, event.code, event.message
        case kinds.AddLoraCompleted() | kinds.SaveCompleted() | kinds.LoadCompleted():
            return kind_of(event), event.step, event.state_digest
    return kind_of(event)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> list[list[object]]:
    """Outcomes of four runs, each alone on a server of its own."""
    found = []
    for number in range(4):
        settings = Settings(data_dir=str(tmp_path_factory.mktemp("alone")), executor="fake", batch_tokens=64)
        schema.upgrade(settings.url)
        store = EventStore.open(settings)
        service = SchedulerService(store, settings)
        service.start()
        asker = ask_for_everything(store, number)
        found.append([outcome(answer, store) for answer in asker.answers()])
        service.stop()
        store.close()
    return found


def types_of(store: EventStore, *types: str) -> list[Recorded]:
    return store.read(0, limit=100_000, types=types)


def test_four_tenants_together_get_what_each_gets_alone(store, serve, undisturbed):
    askers = [ask_for_everything(store, number) for number in range(4)]
    serve()
    together = [[outcome(answer, store) for answer in asker.answers()] for asker in askers]
    assert together == undisturbed
    kinds_seen = {answer[0] for answer in undisturbed[0] if isinstance(answer, tuple)}
    assert kinds_seen >= {
        "add_lora",
        "forward",
        "forward_backward",
        "optim_step",
        "sample",
        "save",
        "load",
        "failed",
    }
    failures = [answer for answer in undisturbed[0] if isinstance(answer, tuple) and answer[0] == "failed"]
    assert [failure[1:3] for failure in failures] == [("user", "no-gradients")]
    several = [e for e in types_of(store, "batch.planned") if len({u.request for u in e.event.units}) > 3]
    assert several, "no batch held requests of several tenants"


@on_sqlite
def test_a_pipelined_step_lands_in_one_batch(store, serve):
    asker = Asker(store, "t", "ad_t")
    asker.add_lora()
    fwdbwd, step = asker.train([datum(random.Random(0), 5)]), asker.step()
    serve()
    first, second = asker.answer(fwdbwd), asker.answer(step)
    assert first.event.batch == second.event.batch
    (ran,) = [e.event for e in types_of(store, "batch.ran") if e.event.batch == first.event.batch]
    assert dict(ran.charges) == {fwdbwd: first.event.cost_us, step: second.event.cost_us}
    assert ran.busy_us == first.event.cost_us + second.event.cost_us


def test_a_killed_executor_loses_and_repeats_nothing(store, serve, undisturbed):
    service = serve(executor_options={"latency_us": "10000"})
    askers = [ask_for_everything(store, number) for number in range(4)]
    killed = set()
    for fraction in (3, 2):
        wanted = sum(len(asker.positions) for asker in askers) // fraction
        eventually(lambda wanted=wanted: len(types_of(store, *RESULTS)) >= wanted)
        pid = service.executor_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
        eventually(lambda: len(types_of(store, "environment.recorded")) == 1 + len(killed))
    disturbed = [[outcome(answer, store) for answer in asker.answers()] for asker in askers]
    assert len(killed) == 2
    assert disturbed == undisturbed


def test_a_restarted_server_goes_on(store, serve, undisturbed):
    askers = [ask_for_everything(store, number) for number in range(4)]
    for _ in range(3):
        service = serve(executor_options={"latency_us": "10000"})
        before = len(types_of(store, *RESULTS))
        eventually(lambda before=before: len(types_of(store, *RESULTS)) >= before + 20)
        started = time.monotonic()
        service.stop(2.0)
        assert time.monotonic() - started < AT_ONCE_S
        left = store.queries.pending()
        assert left
    assert types_of(store, "checkpoint.written")
    serve()
    assert [[outcome(answer, store) for answer in asker.answers()] for asker in askers] == undisturbed


@on_sqlite
def test_a_server_that_ends_in_the_middle_of_a_batch_goes_on(store, serve, undisturbed):
    asker = ask_for_everything(store, 1)
    for _ in range(3):
        before = len(types_of(store, *RESULTS))
        service = serve(executor_options={"latency_us": "50000"})
        eventually(lambda before=before: len(types_of(store, *RESULTS)) > before)
        service.stop(0.0)
    serve()
    assert [outcome(answer, store) for answer in asker.answers()] == undisturbed[1]


def usurp(store: EventStore, settings: Settings, ttl_s: float) -> Lease:
    """Take the lease from whoever has it, as if it had run out."""
    engine = sa.create_engine(settings.url)
    lease = None
    while lease is None:
        with engine.begin() as connection:
            connection.execute(sa.update(tables.leases).values(expires_us=0))
        lease = store.acquire_lease("scheduler", "usurper", ttl_s)
    engine.dispose()
    return lease


def test_a_lost_lease_stops_the_leader_at_once(store, serve, server_settings, undisturbed):
    service = serve(executor_options={"latency_us": "10000"}, lease_ttl_s=0.6)
    askers = [ask_for_everything(store, number) for number in range(2)]
    eventually(lambda: len(types_of(store, *RESULTS)) > 10)
    usurp(store, server_settings, 0.9)
    outcomes = [[outcome(answer, store) for answer in asker.answers()] for asker in askers]
    assert outcomes == undisturbed[:2]
    eventually(lambda: service.leading)
    granted = types_of(store, "lease.granted")
    assert [e.event.epoch for e in granted] == [1, 2, 3]
    _, usurped, regained = (e.position for e in granted)
    work = types_of(store, *RESULTS, "batch.planned", "batch.ran")
    assert [e for e in work if usurped < e.position < regained] == []


def test_a_leader_whose_batch_another_one_answered_meanwhile_waits_its_turn(store, serve, server_settings):
    # It renews its lease long after this test: only the log can tell it that another one leads.
    service = serve(executor_options={"latency_us": "1000000"}, lease_ttl_s=60.0)
    asker = Asker(store, "t", "ad_t")
    asker.add_lora()
    asker.answers()
    running = asker.sample(base=True)
    eventually(lambda: batches_of(store, running))
    lease = usurp(store, server_settings, 2.0)
    failed = kinds.SampleFailed(category="server", code="poison", message="by the other leader")
    fence = (lease.resource, lease.epoch)
    store.append(NewEvent(event=failed, tenant="t", stream="tenant/t", causation=running, fence=fence))
    eventually(lambda: not service.leading)
    asker.train([datum(random.Random(0), 5)])
    asker.step()
    answers = asker.answers()
    assert [kind_of(answer.event) for answer in answers] == ["add_lora", "sample", "forward_backward", "optim_step"]
    assert answers[1].event == failed


@on_sqlite
def test_one_of_two_services_leads_and_the_other_takes_over(store, serve):
    first, second = serve(), serve()
    eventually(lambda: first.leading)
    assert not second.leading
    asker = Asker(store, "t", "ad_t")
    asker.add_lora()
    asker.answers()
    first.stop()
    eventually(lambda: second.leading)
    asker.train([datum(random.Random(0), 5)])
    asker.step()
    assert [kind_of(answer.event) for answer in asker.answers()] == ["add_lora", "forward_backward", "optim_step"]


@on_sqlite
def test_gradients_before_a_save_survive_a_restart(store, serve):
    def run(adapter: str, interrupted: bool) -> list[object]:
        asker = Asker(store, "t", adapter)
        generator = random.Random(0)
        service = serve()
        asker.add_lora()
        asker.train([datum(generator, 30)])
        asker.step()
        asker.step()  # fails, and changes nothing
        asker.train([datum(generator, 30), datum(generator, 3)])
        asker.save(f"ck_{adapter}")
        asker.train([datum(generator, 3)])
        asker.answers()
        if interrupted:
            service.stop()
            service = serve()
        asker.step()
        asker.sample()
        found = [outcome(answer, store) for answer in asker.answers()]
        service.stop()
        return found

    assert run("ad_calm", False) == run("ad_interrupted", True)


@on_sqlite
def test_an_executor_that_dies_idle_is_replaced(store, serve):
    service = serve()
    asker = Asker(store, "t", "ad_t")
    asker.add_lora()
    asker.answers()
    first = service.executor_pid
    os.kill(first, signal.SIGKILL)
    eventually(lambda: len(types_of(store, "environment.recorded")) == 2)
    asker.sample()
    assert isinstance(asker.answers()[-1].event, kinds.SampleCompleted)
    assert types_of(store, "batch.lost") == []


@on_sqlite
def test_a_request_that_kills_the_executor_fails_alone(store, serve, monkeypatch, tmp_path):
    service = serve(executor_options={"latency_us": "600000"})
    victim, killer = Asker(store, "victim", "ad_v"), Asker(store, "killer", "ad_k")
    for asker in (victim, killer):
        asker.add_lora()
        asker.answers()
    fwdbwd = killer.train([datum(random.Random(0), 5)])
    victim.train([datum(random.Random(1), 5)])
    victim.step()
    killed: set[int] = set()
    while (row := store.queries.future("killer", fwdbwd)) and row.result_position is None:
        planned = types_of(store, "batch.planned")[-1].event
        done = {e.event.batch for e in types_of(store, "batch.ran", "batch.lost")}
        pid = service.executor_pid
        runs = planned.batch not in done and fwdbwd in {unit.request for unit in planned.units}
        if runs and pid is not None and pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        time.sleep(0.002)
    failure = killer.answer(fwdbwd).event
    assert (failure.category, failure.code) == ("server", "poison")
    assert len(killed) == 3
    assert [kind_of(answer.event) for answer in victim.answers()] == ["add_lora", "forward_backward", "optim_step"]
    assert not any(isinstance(answer.event, kinds.Failed) for answer in victim.answers())
    assert killer.train([datum(random.Random(0), 5)])
    assert isinstance(killer.answers()[-1].event, kinds.ForwardBackwardCompleted)


@on_sqlite
def test_a_state_that_comes_out_different_is_lost_loudly(store, serve, server_settings):
    service = serve()
    good, bad = Asker(store, "good", "ad_g"), Asker(store, "bad", "ad_b")
    for seed, asker in enumerate((good, bad)):
        asker.add_lora(seed=seed)
        asker.train([datum(random.Random(0), 5)])
        asker.step()
        asker.save(f"ck_{asker.tenant}")
        asker.answers()
    service.stop()
    # A checkpoint blob with other bytes than were written.
    weights = store.queries.checkpoint("bad", "ck_bad").blobs["weights"]
    (path,) = [p for p in server_settings.blob_dir.rglob("*") if p.name == weights]
    kept = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    serve()
    for asker in (good, bad):
        asker.train([datum(random.Random(1), 5)])
        asker.step()
    assert [answer.event.code for answer in bad.answers()[-2:]] == ["state-lost"] * 2
    assert bad.answers()[-1].event.category == "server"
    assert isinstance(good.answers()[-1].event, kinds.OptimStepCompleted)
    path.write_bytes(kept)


@on_sqlite
def test_a_request_that_comes_out_different_stops_its_adapter_and_is_named(store, serve, server_settings):
    service = serve()
    good, bad = Asker(store, "good", "ad_g"), Asker(store, "bad", "ad_b")
    for seed, asker in enumerate((good, bad)):
        asker.add_lora(seed=seed)
        # In no recovery point: gradients are added when the server stops.
        asker.train([datum(random.Random(0), 5)])
    trained = bad.answers()[-1]
    good.answers()
    service.stop()
    digest = trained.event.logprobs_digest
    change = partial(sa.func.replace, tables.events.c.data, type_=sa.Text)
    forge(server_settings, trained.position, data=change(digest, digest[::-1]))
    serve()
    for asker in (good, bad):
        asker.step()
    failure = bad.answers()[-1].event
    assert (failure.category, failure.code) == ("server", "state-lost")
    asked = f"forward_backward at position {trained.causation}"
    assert f"{asked}, executed again: logprobs digest {digest}, recorded {digest[::-1]}" in failure.message
    assert isinstance(good.answers()[-1].event, kinds.OptimStepCompleted)
    forge(server_settings, trained.position, data=change(digest[::-1], digest))


@on_sqlite
def test_an_unreadable_blob_stops_its_adapter_only(store, serve, server_settings):
    service = serve()
    good, bad = Asker(store, "good", "ad_g"), Asker(store, "bad", "ad_b")
    for seed, asker in enumerate((good, bad)):
        asker.add_lora(seed=seed)
        asker.train([datum(random.Random(seed), 5)])
        asker.step()
        asker.answers()
    service.stop()
    (point,) = store.queries.checkpoints("bad", kind="recovery")
    path = BlobStore(server_settings.blob_dir).path(point.blobs["weights"])
    content = path.read_bytes()
    path.unlink()
    # Reading it fails otherwise than for a file that is missing.
    path.mkdir()
    serve()
    for asker in (good, bad):
        asker.train([datum(random.Random(2), 5)])
    failure = bad.answers()[-1].event
    assert failure.code == "state-lost" and f"blob {point.blobs['weights']} cannot be read" in failure.message
    assert isinstance(good.answers()[-1].event, kinds.ForwardBackwardCompleted)
    path.rmdir()
    path.write_bytes(content)


@on_sqlite
def test_a_step_that_another_environment_cannot_repeat_waits_for_the_former_one(store, serve):
    first = serve()
    asker = Asker(store, "t", "ad_t")
    asker.add_lora(seed=1)
    asker.train([datum(random.Random(0), 5)])
    asker.step()
    asker.answers()
    pid = first.executor_pid
    assert pid is not None
    # No recovery point has the step.
    os.kill(pid, signal.SIGKILL)
    first.stop()

    other = serve(executor_options={"rounding_ppm": "1"})
    asker.train([datum(random.Random(1), 5)])
    failure = asker.answers()[-1].event
    assert (failure.category, failure.code) == ("server", "state-lost")
    assert "optim_step at position" in failure.message
    assert "rounding_ppm was 0, is 1. Start the server as it was" in failure.message
    other.stop()

    serve()
    asker.train([datum(random.Random(1), 5)])
    asker.step()
    assert [type(each.event) for each in asker.answers()[-2:]] == [
        kinds.ForwardBackwardCompleted,
        kinds.OptimStepCompleted,
    ]


@on_sqlite
def test_an_accumulated_gradient_goes_on_in_another_environment_if_its_loss_is_near(store, serve):
    asker = Asker(store, "t", "ad_t")
    first = serve()
    asker.add_lora(seed=1)
    asker.train([datum(random.Random(0), 5)])
    asker.answers()
    first.stop()

    far = serve(executor_options={"rounding_ppm": "100000"})
    asker.step()
    failure = asker.answers()[-1].event
    assert failure.code == "state-lost"
    assert "loss" in failure.message and "rounding_ppm was 0, is 100000" in failure.message
    far.stop()

    serve(executor_options={"rounding_ppm": "1"})
    asker.step()
    assert isinstance(asker.answers()[-1].event, kinds.OptimStepCompleted)


@on_sqlite
def test_checkpoints_move_states_between_adapters_and_stay_private(store, serve):
    serve()
    owner, copy, thief = (
        Asker(store, tenant, f"ad_{name}") for tenant, name in (("a", "owner"), ("a", "copy"), ("b", "thief"))
    )
    owner.add_lora(seed=5)
    owner.train([datum(random.Random(0), 5)])
    owner.step()
    owner.save("ck_own")
    owner.answers()
    copy.add_lora(checkpoint="ck_own")
    copy.answers()
    assert copy.digest() == owner.digest()
    thief.add_lora(checkpoint="ck_own")
    (failure,) = thief.answers()
    assert (failure.event.category, failure.event.code) == ("user", "not-found")
    other = Asker(store, "b", "ad_other")
    other.add_lora(seed=5)
    other.load("ck_own")
    other.load("ck_never")
    other.train([datum(random.Random(0), 5)])
    codes = [getattr(answer.event, "code", None) for answer in other.answers()]
    assert codes == [None, "not-found", "not-found", None]
    small = Asker(store, "a", "ad_small")
    small.add_lora(rank=1)
    small.load("ck_own")
    assert small.answers()[-1].event.code == "invalid-request"


@on_sqlite
def test_what_follows_a_removed_or_failed_adapter_fails_in_order(store, serve):
    removed, never = Asker(store, "t", "ad_removed"), Asker(store, "t", "ad_never")
    removed.add_lora()
    removed.sample()
    removed.remove()
    removed.train([datum(random.Random(0), 5)])
    removed.sample()
    never.add_lora(checkpoint="ck_nowhere")
    never.train([datum(random.Random(0), 5)])
    never.step()
    serve()
    assert [getattr(answer.event, "code", None) for answer in removed.answers()] == [
        None,
        None,
        None,
        "not-found",
        "not-found",
    ]
    assert [answer.event.code for answer in never.answers()] == [
        "not-found",
        "adapter-failed",
        "adapter-failed",
    ]
    with pytest.raises(NotFound):
        removed.step()


@on_sqlite
def test_bodies_beyond_the_inline_limit_are_read_when_their_turn_comes(store, serve):
    serve(batch_tokens=4096)
    generator = random.Random(0)
    asker = Asker(store, "t", "ad_t")
    asker.add_lora()
    large = asker.train([datum(generator, 1000) for _ in range(100)], chunk_tokens=1024)
    small = asker.train([datum(generator, 10)])
    asked = store.get(large)
    assert asked is not None and asked.body is None, "the body should be a blob"
    asker.answers()
    answer = asker.answer(large)
    body = store.body(answer)
    assert [len(logprobs) for logprobs in body.logprobs] == [4000] * 100
    batches = {
        planned.event.batch
        for planned in types_of(store, "batch.planned")
        if any(unit.request == large for unit in planned.event.units)
    }
    assert len(batches) > 1
    charged = [us for ran in types_of(store, "batch.ran") for request, us in ran.event.charges if request == large]
    assert sum(charged) == answer.event.cost_us
    assert asker.answer(small)


@on_sqlite
def test_an_executor_that_cannot_start_says_so(store, server_settings):
    wrong = msgspec.structs.replace(server_settings, executor_options={"nonsense": "1"})
    service = SchedulerService(store, wrong)
    with pytest.raises(TinkerbellError, match="nonsense"):
        service.start()
    service.stop()


@on_sqlite
def test_from_request_to_result_takes_three_commits_and_little_else(store, serve):
    serve(executor_options={})
    asker = Asker(store, "t", "ad_t")
    asker.add_lora()
    asker.answers()
    data = [datum(random.Random(0), 4)]
    answered = threading.Event()

    def look(events: Sequence[Recorded]) -> None:
        if any(isinstance(recorded.event, kinds.Result) for recorded in events):
            answered.set()

    unsubscribe = store.subscribe(look)
    commits_s, whole_s = [], []
    for _ in range(60):
        answered.clear()
        started = time.perf_counter()
        asker.train(data)
        commits_s.append(time.perf_counter() - started)
        assert answered.wait(PATIENCE_S)
        whole_s.append(time.perf_counter() - started)
    unsubscribe()
    # The quickest: how others use the machine is not what is asked about, a wait on the way is in each of them.
    assert min(whole_s) < 4 * statistics.median(commits_s) + 0.05


RESULTS = [kinds.type_of(cls) for cls in kinds.Result.__subclasses__() if cls is not kinds.Failed] + [
    kinds.type_of(cls) for cls in kinds.FAILED.values()
]


@on_sqlite
def test_many_samples_are_cut_into_batches_and_are_what_they_are_uncut(store, serve) -> None:
    service = serve(batch_tokens=64)
    cut, other = Asker(store, "alice", "ad_cut"), Asker(store, "bob", "ad_other")
    for asker in (cut, other):
        asker.add_lora()
        asker.answers()
    many = cut.sample_many(30, 20)
    between = other.train([datum(random.Random(1), 8)])
    in_parts = cut.answer(many)
    batches = [r.event for r in store.read(many, types=["batch.planned"], limit=100)]
    parts = [(unit.start, unit.stop) for batch in batches for unit in batch.units if unit.request == many]
    assert parts == [(start, start + 2) for start in range(0, 30, 2)]
    assert other.answer(between).position < in_parts.position, "another tenant does not wait for all of them"
    service.stop()
    serve(batch_tokens=4096)
    whole = cut.answer(cut.sample_many(30, 20))
    assert store.body(whole) == store.body(in_parts)
    assert whole.event.num_sampled_tokens == in_parts.event.num_sampled_tokens


@on_sqlite
def test_adapters_leave_the_executor_and_come_back_as_they_were(store, serve) -> None:
    def train(prefix: str) -> dict[int, list[str | None]]:
        askers = [Asker(store, f"t{number}", f"ad_{prefix}{number}") for number in range(5)]
        digests: dict[int, list[str | None]] = {number: [] for number in range(5)}
        for number, asker in enumerate(askers):
            asker.add_lora(seed=number)
        for turn in range(4):
            for number, asker in enumerate(askers):
                generator = random.Random(100 * number + turn)
                asker.train([datum(generator, 9)])
                if turn % 2:
                    asker.step()
                asker.answers()
                digests[number].append(asker.digest())
        return digests

    crowded = serve(max_resident_adapters=2)
    found = train("a")
    # The last one leaves when its recovery point is written.
    eventually(lambda: len(crowded._leader._residency) <= 2)
    written = store.read(0, limit=1000, types=["checkpoint.written"])
    assert {event.adapter for event in written} >= {"ad_a0", "ad_a1", "ad_a2"}
    crowded.stop()
    serve()
    assert found == train("b")


def test_requests_that_race_with_the_removal_of_their_adapter_are_all_answered(store, serve) -> None:
    service = serve()
    for number in range(8):
        asker = Asker(store, "alice", f"ad_{number}")
        asker.add_lora()
        asker.answers()

        def ask_until_it_is_gone(asker: Asker = asker) -> None:
            while True:
                try:
                    asker.step()
                except NotFound:
                    return

        askers = [threading.Thread(target=ask_until_it_is_gone) for _ in range(3)]
        for thread in askers:
            thread.start()
        asker.remove()
        for thread in askers:
            thread.join(30)
        assert len(asker.answers()) >= 5
        assert service.failed is None


def test_an_adapter_whose_client_vanished_leaves_the_executor_and_comes_back(store, serve):
    """With a step no checkpoint has, and a gradient on top; its neighbour, which works on, stays."""
    gone, works, undisturbed = (Asker(store, "alice", f"ad_{name}") for name in ("gone", "works", "undisturbed"))
    begun = [datum(random.Random(n), 8) for n in range(3)]

    def begin(asker: Asker) -> None:
        asker.add_lora(seed=4)
        asker.train(begun[:1])
        asker.step()
        asker.train(begun[1:2])
        asker.answers()

    def go_on(asker: Asker) -> None:
        asker.train(begun[2:])
        asker.step()
        asker.answers()

    service = serve(idle_adapter_s=1.0)
    begin(gone)
    works.add_lora()

    def is_gone() -> bool:
        works.sample()
        works.answers()
        assert "ad_works" in service._leader._residency
        return "ad_gone" not in service._leader._residency

    eventually(is_gone)
    eventually(lambda: types_of(store, "checkpoint.written") != [])
    (written,) = types_of(store, "checkpoint.written")
    assert (written.adapter, written.event.step) == ("ad_gone", 1)
    go_on(gone)
    begin(undisturbed)
    go_on(undisturbed)
    assert gone.digest() == undisturbed.digest()


def test_an_adapter_that_rests_gets_a_recovery_point_in_time(store, serve):
    serve(checkpoint_every_steps=1000, checkpoint_every_s=0.3)
    asker = Asker(store, "alice", "ad_rests")
    asker.add_lora()
    asker.train([datum(random.Random(1), 8)])
    asker.step()
    asker.answers()
    eventually(lambda: types_of(store, "checkpoint.written") != [])
    (written,) = types_of(store, "checkpoint.written")
    assert (written.event.step, written.event.state_digest) == (1, asker.digest())


def batches_of(store: EventStore, position: int) -> list[str]:
    """Batches that were to run a part of the request."""
    plans = types_of(store, "batch.planned")
    return [plan.event.batch for plan in plans if any(unit.request == position for unit in plan.event.units)]


def charged(store: EventStore, position: int) -> list[tuple[str, int]]:
    """Batches that ran a part of the request, and what they cost."""
    batches = types_of(store, "batch.ran")
    return [(ran.event.batch, us) for ran in batches for request, us in ran.event.charges if request == position]


def test_a_cancelled_sample_never_runs_and_the_others_are_answered_in_order(store, serve):
    serve(executor_options={"latency_us": "300000"})
    asker = Asker(store, "t", "ad_t")
    asker.add_lora()
    asker.answers()
    runs = asker.sample(seed=1)
    eventually(lambda: batches_of(store, runs))
    before, cancelled, after = (asker.sample(seed=seed) for seed in (2, 3, 4))
    step = asker.step()
    asker.cancel(runs)
    asker.cancel(cancelled)
    failure = asker.answer(cancelled).event
    assert isinstance(failure, kinds.SampleFailed)
    assert (failure.category, failure.code, failure.batch, failure.cost_us) == ("user", "cancelled", None, 0)
    assert store.queries.future("t", step).state == "pending", "it waits for nobody in its queue"
    assert isinstance(asker.answer(runs).event, kinds.SampleCompleted), "what runs is not interrupted"
    positions = [asker.answer(position).position for position in (runs, before, after, step)]
    assert positions == sorted(positions)
    assert batches_of(store, cancelled) == [] and len(batches_of(store, after)) == 1


@on_sqlite
def test_a_cancel_is_known_to_the_next_leader_and_its_adapter_is_not_restored(store, serve):
    service = serve()
    asker, other = Asker(store, "t", "ad_t"), Asker(store, "u", "ad_u")
    for each in (asker, other):
        each.add_lora()
        each.train([datum(random.Random(0), 5)])
        each.step()
        each.answers()
    service.stop()
    cancelled, base, kept = asker.sample(), asker.sample(base=True), other.sample()
    for position in (cancelled, base):
        asker.cancel(position)
    service = serve()
    assert [asker.answer(position).event.code for position in (cancelled, base)] == ["cancelled"] * 2
    assert isinstance(other.answer(kept).event, kinds.SampleCompleted)
    assert batches_of(store, cancelled) == batches_of(store, base) == []
    assert "ad_t" not in service._leader._residency


@on_sqlite
@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("cancelled", [False, True])
def test_what_ran_of_many_samples_is_charged(store, serve, restarted, cancelled):
    service = serve(executor_options={"latency_us": "30000"})
    asker = Asker(store, "t", "ad_t")
    asker.add_lora()
    asker.answers()
    many = asker.sample_many(30, 20)
    eventually(lambda: len(charged(store, many)) >= 3)
    if restarted:
        service.stop()
    if cancelled:
        asker.cancel(many)
    if restarted:
        serve()
    answer = asker.answer(many).event
    ran = charged(store, many)
    assert isinstance(answer, kinds.SampleFailed if cancelled else kinds.SampleCompleted)
    assert (answer.batch, answer.cost_us) == (ran[-1][0], sum(us for _, us in ran))
    assert len(ran) < 15 or not cancelled
