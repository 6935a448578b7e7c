"""What goes wrong over one request is its own: it ends no scheduler, and the others are answered as if nothing had
happened. On SQLite and Postgres; the API's store and the scheduler's are two, as where roles run apart."""

import random
import struct
from collections.abc import Callable, Iterator

import msgspec
import pytest
import sqlalchemy as sa

from tests.e2e.test_scheduler_service import Asker, datum, ints
from tests.support.owner import as_owner
from tests.support.poison import poisoned
from tinkerbell.config import Settings
from tinkerbell.errors import InvalidRequest, Unavailable
from tinkerbell.events import codec, kinds, tables
from tinkerbell.events.blobs import BlobStore
from tinkerbell.events.kinds import ForwardBackwardBody, Recorded, SampleBody
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler import leader
from tinkerbell.scheduler.batching import Work
from tinkerbell.scheduler.service import SchedulerService
from tinkerbell.scheduler.settlement import Settlement
from tinkerbell.types import Datum, LossSpec, SamplingParams

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what does not depend on the database."""


@pytest.fixture
def server_settings(database_settings: Settings) -> Settings:
    return msgspec.structs.replace(
        database_settings,
        batch_tokens=64,
        checkpoint_every_steps=1,
        lease_ttl_s=2.0,
    )


@pytest.fixture
def store(server_settings: Settings) -> Iterator[EventStore]:
    """The API's."""
    opened = EventStore.open(server_settings)
    yield opened
    opened.close()


@pytest.fixture
def serve(server_settings: Settings) -> Iterator[Callable[[], SchedulerService]]:
    """A scheduler with a store of its own."""
    running: list[tuple[SchedulerService, EventStore]] = []

    def start() -> SchedulerService:
        own = EventStore.open(server_settings)
        service = SchedulerService(own, server_settings)
        running.append((service, own))
        service.start()
        return service

    yield start
    for service, own in running:
        service.stop()
        assert service.failed is None
        own.close()


def asker(store: EventStore, name: str) -> Asker:
    made = Asker(store, name, f"ad_{name}")
    made.add_lora(seed=3)
    return made


def a_step(of: Asker) -> None:
    of.train([datum(random.Random(1), 5)])
    of.step()


def completed(of: Asker) -> list[Recorded]:
    found = of.answers()
    assert not [each.event for each in found if isinstance(each.event, kinds.Failed)]
    return found


def num_leaderships(store: EventStore) -> int:
    return len(store.read(0, types=["lease.granted"]))


def test_requests_that_cannot_be_read_fail_in_order_while_others_go_on(
    store: EventStore, serve: Callable[[], SchedulerService]
) -> None:
    good, bad = asker(store, "good"), asker(store, "bad")
    a_step(bad)
    with poisoned():
        event = kinds.SampleRequested(params=SamplingParams(stop=("",)), num_tokens=3)
        before = [bad.ask(event, SampleBody(prompt=ints([1, 2, 3])), base=base) for base in (True, False)]
    with poisoned(version=9):
        newer = bad.step()
    # Poisoning holds for the whole process: nobody may read in the meantime.
    serve()
    a_step(bad)
    a_step(good)
    completed(good)
    for position in (*before, newer):
        failure = bad.answer(position).event
        assert isinstance(failure, kinds.Failed) and (failure.category, failure.code) == ("server", "corrupt")
    assert not isinstance(bad.answers()[-1].event, kinds.Failed)
    assert num_leaderships(store) == 1
    assert sorted(each.position for each in store.check().unreadable) == sorted([*before, newer])


def test_a_tenant_whose_key_cannot_be_used_fails_alone(
    store: EventStore, server_settings: Settings, serve: Callable[[], SchedulerService]
) -> None:
    good, bad = asker(store, "good"), asker(store, "bad")
    a_step(bad)
    a_step(good)
    keys = tables.data_keys
    with as_owner(server_settings) as connection:
        wrapped = connection.execute(sa.select(keys.c.wrapped).where(keys.c.tenant == "good")).scalar_one()
        # Another tenant's, as after a mistaken restore.
        connection.execute(keys.update().where(keys.c.tenant == "bad").values(wrapped=wrapped))
    serve()
    a_step(good)
    completed(good)
    failure = bad.answers()[1].event
    assert isinstance(failure, kinds.Failed) and failure.code == "key-unavailable" and "bad" in failure.message
    assert num_leaderships(store) == 1


@on_sqlite
@pytest.mark.parametrize("number", [24, 5])
def test_errors_of_the_operating_system_are_tried_again(
    store: EventStore, serve: Callable[[], SchedulerService], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Too many open files and a slow disk, while a body, a checkpoint and the state of an adapter are read."""
    good, bad = asker(store, "good"), asker(store, "bad")
    a_step(bad)
    bad.save("ck_bad")
    service = serve()
    completed(bad)
    service.stop()
    left = {"reads": 6}
    read = BlobStore.get

    def fails(blobs: BlobStore, digest: str) -> bytes:
        if left["reads"]:
            left["reads"] -= 1
            raise Unavailable(f"blob {digest} cannot be read now") from OSError(number, "not now")
        return read(blobs, digest)

    monkeypatch.setattr(BlobStore, "get", fails)
    # A body too large to be inline.
    bad.train([datum(random.Random(number), 3000) for _ in range(8)], chunk_tokens=64 * 1024)
    bad.step()
    bad.load("ck_bad")
    a_step(good)
    serve()
    completed(good)
    completed(bad)
    assert left["reads"] == 0 and num_leaderships(store) == 2


def fail_over(tenant: str, of: Callable[..., object]) -> Callable[..., object]:
    def wrapped(*args: object, **kwargs: object) -> object:
        plan = next(each for each in args if hasattr(each, "requests"))
        if any(request.tenant == tenant and request.kind == "forward" for request in plan.requests):
            raise RuntimeError("a defect that nobody expected")
        return of(*args, **kwargs)

    return wrapped


@on_sqlite
@pytest.mark.parametrize("where", ["units", "charge", "answers", "planned", "write"])
def test_an_unexpected_error_over_a_request_ends_at_most_one_leadership(
    store: EventStore, serve: Callable[[], SchedulerService], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    good, bad = asker(store, "good"), asker(store, "bad")
    match where:
        case "units":
            monkeypatch.setattr(leader, "units_of", fail_over("bad", leader.units_of))
        case "charge" | "answers":
            monkeypatch.setattr(Settlement, where, fail_over("bad", getattr(Settlement, where)))
        case "planned":
            planned = leader.planned

            def broken(work: Work) -> kinds.PlannedUnit:
                if (work.request.tenant, work.request.kind) == ("bad", "forward"):
                    raise RuntimeError("a defect that nobody expected")
                return planned(work)

            monkeypatch.setattr(leader, "planned", broken)
        case _:
            prepare = codec.prepare

            def refused(new: kinds.NewEvent, seal: object = None) -> object:
                if new.tenant == "bad" and isinstance(new.event, kinds.ForwardCompleted):
                    raise InvalidRequest("the log does not take this")
                return prepare(new, seal)  # type: ignore[arg-type]

            monkeypatch.setattr(codec, "prepare", refused)
    bad.train([datum(random.Random(2), 5)], kind="forward")
    a_step(bad)
    a_step(good)
    serve()
    completed(good)
    failure, *after = [each.event for each in bad.answers()[1:]]
    assert isinstance(failure, kinds.Failed) and failure.code in ("poison", "server-error")
    assert not [each for each in after if isinstance(each, kinds.Failed)]
    assert num_leaderships(store) <= 2
    store.check()


def test_a_sum_that_is_not_finite_fails_its_request_and_leaves_no_gradient(
    store: EventStore, serve: Callable[[], SchedulerService]
) -> None:
    """Each chunk of it is finite. The optim_step behind it, in the same batch, steps along what the log has."""
    plain, bad = asker(store, "plain"), asker(store, "bad")
    near = datum(random.Random(4), 4)

    def policy(weight: float) -> Datum:
        inputs = {"logprobs": -680.0, "advantages": 0.0, "weights": weight}
        return Datum(
            near.tokens, near.targets, {name: struct.pack("<4f", *[each] * 4) for name, each in inputs.items()}
        )

    def ask(data: list[Datum], kind: type[kinds.AnyRequest]) -> int:
        event = kind(  # type: ignore[call-arg]
            loss=LossSpec(name="importance_sampling"), num_datums=len(data), num_tokens=4 * len(data), chunk_tokens=4
        )
        return bad.ask(event, ForwardBackwardBody(data=data))

    service = serve()
    probe = bad.answer(ask([policy(1.0)], kinds.ForwardRequested)).event
    assert isinstance(probe, kinds.ForwardCompleted)
    weight = 0.6 * 1.7976931348623157e308 / probe.metrics["ratio_sum"]
    service.stop()
    for of in (plain, bad):
        of.train([near])
    spoiled = [ask([policy(weight)] * 2, kind) for kind in (kinds.ForwardRequested, kinds.ForwardBackwardRequested)]
    for of in (plain, bad):
        of.step()
        a_step(of)
    serve()
    completed(plain)
    bad.answers()
    for position in spoiled:
        failure = bad.answer(position).event
        assert isinstance(failure, kinds.Failed) and (failure.category, failure.code) == ("user", "non-finite")
        assert "metrics.ratio_sum" in failure.message
    assert bad.digest() == plain.digest()
    assert num_leaderships(store) == 2
    store.check()
