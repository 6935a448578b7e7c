"""One run as the log tells it: every request of an adapter with its answer, its plan and the environment it ran in."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tinkerbell.errors import Corrupt, InvalidRequest, NotFound
from tinkerbell.events import kinds
from tinkerbell.events.kinds import EnvironmentRecorded, PlannedUnit
from tinkerbell.replay.log import Entry, Log
from tinkerbell.scheduler.recovery import BOUNDARIES, ORIGINS, Marks, last_marks
from tinkerbell.types import SYSTEM_TENANT

_NUMBER = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Call:
    """A request and what became of it."""

    request: Entry
    result: Entry | None
    """None: not answered yet."""
    units: tuple[PlannedUnit, ...]
    """What batches planned of it, in the order of the log; a lost batch's, too."""
    environment: str | None
    """Digest of the environment.recorded in which it was answered; None where nothing ran."""

    @property
    def position(self) -> int:
        return self.request.position

    @property
    def kind(self) -> str:
        return kinds.kind_of(self.request.recorded.event)

    @property
    def asked(self) -> kinds.AnyRead:
        return self.request.recorded.event

    @property
    def answer(self) -> kinds.AnyRead | None:
        return None if self.result is None else self.result.recorded.event


@dataclass(frozen=True, slots=True)
class History:
    """A run. A run is an adapter: it has its id."""

    run: str
    tenant: str
    name: str | None
    calls: tuple[Call, ...]
    """In the order of acceptance, which is that of their effects; samples among them."""
    entries: tuple[Entry, ...]
    """Every event of the adapter, by position."""
    plans: dict[str, Entry]
    """Batch id -> batch.planned, of the batches that ran some of it."""
    environments: dict[str, Entry]
    """Digest -> environment.recorded."""
    gone: frozenset[int]
    """Positions of the server's recovery points whose bytes were taken out: newer ones superseded them. Nothing rests
    on one; what it held can be had from an earlier state."""

    @property
    def made(self) -> kinds.AddLoraRequested:
        """What was asked for in the first place."""
        event = self.calls[0].asked
        assert isinstance(event, kinds.AddLoraRequested)
        return event

    def environment(self, digest: str) -> EnvironmentRecorded:
        """Raises NotFound."""
        if digest not in self.environments:
            raise NotFound(f"the log has no environment {digest[:12]}, which a batch of {self.run} names")
        event = self.environments[digest].recorded.event
        assert isinstance(event, EnvironmentRecorded)
        return event

    def checkpoints(self) -> Iterator[Entry]:
        """The server's recovery points that are still there."""
        return (each for each in _recovery_points(self.entries) if each.position not in self.gone)

    def marks(self, until: int | None = None, *, users_own: bool = False) -> Marks:
        """The newest saved state that holds requests up to position `until` and none after it. `users_own`: of the
        states that a caller of the server can name, which its recovery points are not. Raises NotFound."""
        marks = last_marks(
            [
                each.recorded
                for each in self.entries
                if isinstance(each.recorded.event, (*ORIGINS, *BOUNDARIES))
                and each.position not in self.gone
                and each.recorded.causation is not None
                and (until is None or each.recorded.causation <= until)
                and not (users_own and isinstance(each.recorded.event, kinds.CheckpointWritten))
            ]
        )
        if marks is None:
            raise NotFound(f"the adapter {self.run} was never made: its add_lora has no result")
        return marks

    def place(self, at: str) -> Call:
        """The request at `SEQ`, or `step:N`: the optim_step that came to step N (the last one that did).

        Raises InvalidRequest for what is no place, NotFound for one that the run has not reached.
        """
        word, colon, number = at.rpartition(":")
        if not _NUMBER.fullmatch(number) or (colon and word != "step"):
            raise InvalidRequest(f"{at!r} is neither SEQ (as 12) nor step:N (as step:6)")
        found: Call | None = None
        for call in self.calls:
            if colon:
                if isinstance(call.answer, kinds.OptimStepCompleted) and call.answer.step == int(number):
                    found = call
            elif call.request.recorded.seq == int(number):
                found = call
        if found is None or found.result is None:
            raise NotFound(f"the run {self.run} has not come to {at}; {self.extent()}")
        return found

    def extent(self) -> str:
        """How far it goes, for a person."""
        seqs = [call.request.recorded.seq for call in self.calls if call.result is not None]
        last = max((seq for seq in seqs if seq is not None), default=None)
        steps = max((c.answer.step for c in self.calls if isinstance(c.answer, kinds.OptimStepCompleted)), default=0)
        return f"it is answered up to seq {last}, step {steps}"


def find_run(log: Log, run: str) -> Entry:
    """The add_lora.requested of an adapter by its id, or by its name if only one has it. Raises NotFound."""
    ids = [run]
    if (made := _made(log, run)) is None:
        ids = log.named(run)
        made = _made(log, ids[0]) if len(ids) == 1 else None
    if made is not None:
        return made
    if len(ids) > 1:
        raise InvalidRequest(f"{len(ids)} runs are called {run}: say which of {', '.join(ids)}")
    if (copied := next(log.entries(adapter=run, types=["checkpoint.copied"]), None)) is not None:
        assert isinstance(copied.recorded.event, kinds.CheckpointCopied)
        raise NotFound(
            f"{run} is a copy of the checkpoint {copied.recorded.event.source}, and nothing ran in it: replay the run"
            " that the checkpoint was saved of"
        )
    raise NotFound(f"no run {run} in {log.name}; `tinkerbell replay runs` lists what there is")


def _made(log: Log, adapter: str) -> Entry | None:
    return next(log.entries(adapter=adapter, types=["add_lora.requested"]), None)


def read_history(log: Log, run: str) -> History:
    """The run with this id or name. Raises NotFound, InvalidRequest, Corrupt."""
    made = find_run(log, run)
    adapter = made.recorded.adapter
    assert adapter is not None
    entries = tuple(log.entries(made.position - 1, adapter=adapter))
    results = {each.recorded.causation: each for each in entries if kinds.is_result(each.recorded.event)}
    requests = [each for each in entries if kinds.is_request(each.recorded.event)]
    _require_readable(entries, results)
    units: dict[int, list[PlannedUnit]] = {each.position: [] for each in requests}
    plans = _plans(log, made.position, entries[-1].position, units)
    calls: list[Call] = []
    for each in requests:
        result = results.get(each.position)
        batch = getattr(result.recorded.event, "batch", None) if result is not None else None
        plan = plans.get(batch) if batch is not None else None
        environment = getattr(plan.recorded.event, "environment", None) if plan is not None else None
        calls.append(Call(each, result, tuple(units[each.position]), environment))
    wanted = {call.environment for call in calls}
    environments = {
        each.recorded.event.digest: each
        for each in log.entries(tenant=SYSTEM_TENANT, types=["environment.recorded"])
        if isinstance(each.recorded.event, EnvironmentRecorded) and each.recorded.event.digest in wanted
    }
    event = made.recorded.event
    assert isinstance(event, kinds.AddLoraRequested)
    gone = frozenset(log.removed([each.position for each in _recovery_points(entries)]))
    return History(adapter, made.recorded.tenant, event.name, tuple(calls), entries, plans, environments, gone)


def _recovery_points(entries: Iterable[Entry]) -> Iterator[Entry]:
    return (each for each in entries if isinstance(each.recorded.event, kinds.CheckpointWritten))


def _require_readable(entries: Iterable[Entry], results: Mapping[int | None, Entry]) -> None:
    """Raise Corrupt for what cannot be read and had an effect; a request that failed had none."""
    for each in entries:
        event, result = each.recorded.event, results.get(each.position)
        failed = result is not None and isinstance(result.recorded.event, kinds.Failed)
        if isinstance(event, kinds.Unreadable) and not failed:
            raise Corrupt(f"event {each.position} of the run cannot be read: {event.why}")


def _plans(log: Log, after: int, until: int, units: dict[int, list[PlannedUnit]]) -> dict[str, Entry]:
    """The batch.planned events with some of these requests, whose units are added to `units`."""
    plans: dict[str, Entry] = {}
    for each in log.entries(after, until=until, tenant=SYSTEM_TENANT, types=["batch.planned"]):
        event = each.recorded.event
        if not isinstance(event, kinds.BatchPlanned):
            continue
        mine = [unit for unit in event.units if unit.request in units]
        for unit in mine:
            units[unit.request].append(unit)
        if mine:
            plans[event.batch] = each
    return plans
