"""Random histories against a small model of the store; the whole log is checked at the end of each."""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.support import limits, log
from tests.support.poison import poisoned
from tinkerbell.cli.bench.postgres import ScratchPostgres
from tinkerbell.config import Settings
from tinkerbell.errors import (
    AlreadyAnswered,
    Conflict,
    Fenced,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    SequenceConflict,
)
from tinkerbell.events import kinds
from tinkerbell.events.kinds import NewEvent, Recorded
from tinkerbell.events.leases import Lease
from tinkerbell.events.store import EventStore
from tinkerbell.types import SamplingParams

ADAPTERS = {"ad_a": "alice", "ad_b": "alice", "ad_c": "bob"}
NAMES = st.sampled_from(sorted(ADAPTERS))
BUILT = [
    (type_, each)
    for type_ in ("sample.requested", "forward_backward.requested", "optim_step.requested", "session.started")
    for each in limits.varied(log.examples()[type_][0])
]
"""Events built in code, each with one field at a limit, under it or over it."""


class StoreMachine(RuleBasedStateMachine):
    """The model: the adapters' states and sequences, what waits for an answer, keys, the lease's epoch, the head."""

    new_database: Callable[[Path], str]
    """Makes an empty, up-to-date database; set by the test."""

    @initialize()
    def start(self) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="tinkerbell-machine-")
        url = type(self).new_database(Path(self.directory.name))
        self.settings = Settings(data_dir=self.directory.name, database_url=url)
        self.head = 0
        self.states: dict[str, str] = {}
        self.next_seq: dict[str, int] = {}
        self.waiting: dict[str, list[Recorded]] = {name: [] for name in ADAPTERS}
        self.samples: list[Recorded] = []
        self.unreadable: set[int] = set()
        self.keys: dict[tuple[str, str], tuple[str, int]] = {}
        self.lease: Lease | None = None
        self.epoch = 0
        self.tail: list[int] = []
        self.open()
        # Where most histories would get to anyway: a leader, and an adapter with requests behind one another.
        self.take_lease()
        for name in ("ad_a", "ad_c"):
            self.add(name)
            for kind in (log.forward_backward, log.optim_step, log.save):
                self.ask(name, kind, foreign=False, off=None)

    def open(self) -> None:
        self.store = EventStore.open(self.settings)
        self.tail = []
        # From the beginning: what lies in the database, and cannot all be read, comes before what is written now.
        self.store.subscribe(self.see, after=0)

    def see(self, events: Sequence[Recorded]) -> None:
        self.tail += [item.position for item in events]

    def accept(self, recorded: Recorded) -> None:
        self.head += 1
        assert recorded.position == self.head

    # ---- requests ----------------------------------------------------------------------------------------------------

    @rule(name=NAMES)
    def add(self, name: str) -> None:
        try:
            (recorded,) = self.store.append(log.add_lora(name, ADAPTERS[name]))
        except Conflict:
            assert name in self.states
            return
        assert name not in self.states and recorded.seq == 0
        self.accept(recorded)
        self.states[name], self.next_seq[name] = "living", 1
        self.waiting[name].append(recorded)

    @rule(
        name=NAMES,
        kind=st.sampled_from([log.forward_backward, log.optim_step, log.save, log.remove_lora]),
        foreign=st.sampled_from([False, False, False, True]),
        off=st.sampled_from([None, None, None, 0, 1, -1]),
    )
    def ask(self, name: str, kind: Callable[[str, str], NewEvent], foreign: bool, off: int | None) -> None:
        tenant = "mallory" if foreign else ADAPTERS[name]
        expected = None if off is None else self.next_seq.get(name, 0) + off
        new = msgspec.structs.replace(kind(name, tenant), expected_seq=expected)
        if isinstance(new.event, kinds.SaveRequested):
            event = kinds.SaveRequested(checkpoint=f"ck_{self.head}")
            new = msgspec.structs.replace(new, event=event)
        try:
            (recorded,) = self.store.append(new)
        except NotFound:
            assert foreign or self.states.get(name) != "living"
            return
        except SequenceConflict:
            assert off not in (None, 0)
            return
        assert not foreign and self.states[name] == "living" and off in (None, 0)
        assert recorded.seq == self.next_seq[name]
        self.accept(recorded)
        self.next_seq[name] += 1
        self.waiting[name].append(recorded)

    @rule(name=st.one_of(st.none(), NAMES))
    def ask_sample(self, name: str | None) -> None:
        try:
            (recorded,) = self.store.append(log.sample(name, ADAPTERS[name] if name else "bob"))
        except NotFound:
            assert name is not None and self.states.get(name) != "living"
            return
        assert recorded.seq is None
        self.accept(recorded)
        self.samples.append(recorded)

    @rule(tenant=st.sampled_from(["alice", "bob"]), key=st.sampled_from(["k1", "k2"]), what=st.sampled_from(["x", "y"]))
    def ask_with_key(self, tenant: str, key: str, what: str) -> None:
        new = msgspec.structs.replace(
            log.sample(None, tenant), idempotency_key=key, request_hash=log.request_hash(what)
        )
        known = self.keys.get((tenant, key))
        try:
            (recorded,) = self.store.append(new)
        except IdempotencyConflict:
            assert known is not None and known[0] != what
            return
        if known is not None:
            assert known == (what, recorded.position)
            assert self.store.get(recorded.position) == recorded
            return
        self.accept(recorded)
        self.keys[tenant, key] = (what, recorded.position)
        self.samples.append(recorded)

    # ---- what is built in code, and what cannot be read --------------------------------------------------------------

    @rule(built=st.lists(st.integers(0, len(BUILT) - 1), min_size=1, max_size=6))
    def ask_for_what_was_built(self, built: list[int]) -> None:
        for type_, each in map(BUILT.__getitem__, built):
            _, body = log.examples()[type_]
            new = NewEvent(event=each.struct, tenant="alice", stream="tenant/alice", body=body)  # type: ignore[arg-type]
            adapter = "ad_a" if type_ in ("forward_backward.requested", "optim_step.requested") else None
            if adapter is not None:
                new = msgspec.structs.replace(new, stream=f"adapter/{adapter}", adapter=adapter)
            try:
                (recorded,) = self.store.append(new)
            except InvalidRequest as exc:
                assert not each.fits and each.field in exc.detail
                continue
            except NotFound:
                assert each.fits and adapter is not None and self.states[adapter] != "living"
                continue
            assert each.fits
            self.accept(recorded)
            assert self.store.get(recorded.position) == recorded
            if adapter is not None:
                self.next_seq[adapter] += 1
                self.waiting[adapter].append(recorded)
            elif isinstance(recorded.event, kinds.SampleRequested):
                self.samples.append(recorded)

    @rule(name=st.one_of(st.none(), NAMES), newer=st.booleans())
    def meet_what_cannot_be_read(self, name: str | None, newer: bool) -> None:
        """As an older release wrote it beyond the limits, or as a newer one writes it."""
        event = kinds.SampleRequested(params=SamplingParams(stop=() if newer else ("",)), num_tokens=3)
        new = msgspec.structs.replace(log.sample(name, ADAPTERS[name] if name else "bob"), event=event)
        with poisoned(version=9 if newer else None):
            try:
                (recorded,) = self.store.append(new)
            except NotFound:
                assert name is not None and self.states.get(name) != "living"
                return
        self.accept(recorded)
        self.unreadable.add(recorded.position)
        read = self.store.get(recorded.position)
        assert read is not None and isinstance(read.event, kinds.Unreadable)
        self.samples.append(read)

    # ---- results -----------------------------------------------------------------------------------------------------

    @rule(name=NAMES, fails=st.lists(st.booleans(), min_size=1, max_size=4))
    def answer_some(self, name: str, fails: list[bool]) -> None:
        for fail in fails:
            self.answer(name, 0, fail, 0, 5)

    @rule(name=NAMES, which=st.integers(0, 2), fail=st.booleans(), stale=st.integers(0, 1), cost=st.integers(0, 9))
    def answer(self, name: str, which: int, fail: bool, stale: int, cost: int) -> None:
        if which >= len(self.waiting[name]):
            return
        asked = self.waiting[name][which]
        fence = ("scheduler", self.epoch - stale)
        answer = log.failed(asked, cost_us=cost) if fail else self.completed(asked, cost)
        charge = kinds.BatchRan(batch=f"b.{self.head}", busy_us=cost, charges=[(asked.position, cost)])
        try:
            ran, recorded = self.store.append(log.system(charge), msgspec.structs.replace(answer, fence=fence))
        except Fenced:
            assert stale
            return
        except AlreadyAnswered:
            assert which > 0
            return
        assert not stale and which == 0
        self.accept(ran)
        self.accept(recorded)
        self.waiting[name].pop(0)
        match answer.event:
            case kinds.AddLoraFailed():
                self.states[name] = "failed"
            case kinds.RemoveLoraCompleted():
                self.states[name] = "removed"
            case _:
                pass
        with pytest.raises(AlreadyAnswered):
            self.store.append(answer)

    def completed(self, asked: Recorded, cost: int) -> NewEvent:
        match asked.event:
            case kinds.AddLoraRequested():
                new = log.add_lora_completed(asked)
            case kinds.ForwardBackwardRequested():
                new = log.forward_backward_completed(asked)
            case kinds.OptimStepRequested():
                new = log.optim_step_completed(asked, asked.position)
            case kinds.SaveRequested():
                new = log.save_completed(asked, b"w%d" % asked.position)
            case _:
                new = log.result(kinds.RemoveLoraCompleted(), asked)
        return msgspec.structs.replace(new, event=msgspec.structs.replace(new.event, cost_us=cost))

    @precondition(lambda self: self.samples)
    @rule(data=st.data())
    def answer_sample(self, data: st.DataObject) -> None:
        asked = self.samples.pop(data.draw(st.integers(0, len(self.samples) - 1)))
        readable = not isinstance(asked.event, kinds.Unreadable)
        failure = kinds.SampleFailed(category="server", code="corrupt", message="it cannot be read")
        (recorded,) = self.store.append(log.sample_completed(asked) if readable else log.result(failure, asked))
        self.accept(recorded)

    # ---- leases, groups, restarts ------------------------------------------------------------------------------------

    @rule()
    def take_lease(self) -> None:
        lease = self.store.acquire_lease("scheduler", "me", 100)
        assert (lease is None) == (self.lease is not None)
        if lease is not None:
            self.head += 1
            self.epoch += 1
            assert lease.epoch == self.epoch
            self.lease = lease

    @rule()
    def give_lease_back(self) -> None:
        if self.lease is not None:
            assert self.store.renew_lease(self.lease, 100)
            self.store.release_lease(self.lease)
            self.lease = None

    @rule(pattern=st.lists(st.booleans(), min_size=2, max_size=12))
    def many_at_once(self, pattern: list[bool]) -> None:
        """Submits of two events each, some of which are refused for their second."""
        futures = [
            self.store.submit(
                log.sample(None, "bob"), log.sample(None, "bob") if good else log.sample("ad_none", "bob")
            )
            for good in pattern
        ]
        for good, future in zip(pattern, futures, strict=True):
            if good:
                for recorded in future.result():
                    self.accept(recorded)
                    self.samples.append(recorded)
            else:
                assert isinstance(future.exception(), NotFound)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.open()

    @invariant()
    def the_head_is_the_models(self) -> None:
        if hasattr(self, "store"):
            assert self.store.head() == self.head
            waiting = sorted(item.position for items in (*self.waiting.values(), self.samples) for item in items)
            assert [row.id for row in self.store.queries.pending()] == waiting

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            report = self.store.check()
            assert report.num_events == self.head
            assert {each.position for each in report.unreadable} == self.unreadable
            read = self.store.read(0, limit=self.head)
            assert [each.position for each in read] == list(range(1, self.head + 1))
            assert {each.position for each in read if isinstance(each.event, kinds.Unreadable)} == self.unreadable
            for name, state in self.states.items():
                row = self.store.queries.adapter(ADAPTERS[name], name)
                assert row is not None and row.next_seq == self.next_seq[name]
                assert {"pending": "living", "ready": "living"}.get(row.state, row.state) == state
        finally:
            self.store.close()
            self.directory.cleanup()
        # The tail may have been stopped early by a close, but never skips and never repeats.
        assert self.tail == list(range(1, 1 + len(self.tail)))


def test_histories_on_sqlite(sqlite_template: Path) -> None:
    def new_database(directory: Path) -> str:
        shutil.copyfile(sqlite_template, directory / "x.db")
        return f"sqlite:///{directory / 'x.db'}"

    class OnSqlite(StoreMachine):
        pass

    OnSqlite.new_database = staticmethod(new_database)  # type: ignore[assignment]
    run_state_machine_as_test(OnSqlite, settings=quick(60))


@pytest.mark.postgres
def test_histories_on_postgres(postgres: ScratchPostgres) -> None:
    admin = sa.create_engine(postgres.url(), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    numbers = itertools.count()

    def new_database(directory: Path) -> str:
        name = f"machine_{next(numbers)}"
        with admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        return postgres.url(name)

    class OnPostgres(StoreMachine):
        pass

    OnPostgres.new_database = staticmethod(new_database)  # type: ignore[assignment]
    run_state_machine_as_test(OnPostgres, settings=quick(12))


def quick(examples: int) -> settings:
    """The same histories in every run, so that a red run is everybody's."""
    return settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
