"""Executes a run again, request after request, in an executor of its own, and compares as it goes."""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from tinkerbell.errors import Compacted
from tinkerbell.events import kinds
from tinkerbell.events.base_models import base_model_of, require_same
from tinkerbell.events.kinds import EnvironmentRecorded
from tinkerbell.executors.port import AdapterState, Environment, OptimStepDone, UnitFailed
from tinkerbell.replay.compare import Comparison
from tinkerbell.replay.curves import Point, per_token
from tinkerbell.replay.findings import Finding
from tinkerbell.replay.history import Call, History
from tinkerbell.replay.integrity import Tell
from tinkerbell.replay.log import Entry, Log, blob_of
from tinkerbell.replay.session import Change, ExecutorChoice, Outcome, Passed, Session
from tinkerbell.scheduler.environments import Difference, differences, tolerance_of

BATCH_TOKENS = 8192
"""Most tokens that are executed together: of memory, not of bits."""

TRAINING = ("forward", "forward_backward", "optim_step")


class Replayer:
    """Use as an async context manager; `begin`, then `advance` once or more. Belongs to one event loop."""

    def __init__(
        self,
        log: Log,
        history: History,
        choice: ExecutorChoice,
        tell: Tell,
        *,
        rtol: float | None = None,
        samples: bool = False,
        keep_going: bool = False,
        any_model: bool = False,
    ) -> None:
        """`samples`: draw samples again, too. `keep_going`: past the first finding. `any_model`: beside another base
        model, too, which only who wants to see what differs can want."""
        self._log = log
        self._history = history
        self._choice = choice
        self._tell = tell
        self._rtol = rtol
        self._samples = samples
        self._keep_going = keep_going
        self._any_model = any_model
        self._session: Session | None = None
        self._recorded: EnvironmentRecorded | None = None
        self._reached = 0
        """Position of the last request that is in the adapter's state."""
        self._since: list[Call] = []
        """forward_backward requests since the last step: their gradients are in no snapshot."""
        self._losses = (0.0, 0.0, 0)
        """Recorded, replayed, tokens: since the last step."""
        self._checkpoints: dict[int, list[Entry]] = {}
        for each in history.checkpoints():
            self._checkpoints.setdefault(each.recorded.causation or 0, []).append(each)
        self.comparison = Comparison(log, tolerance_of(None, rtol))
        self.environment: Environment | None = None
        """Of the executor that runs now."""
        self.differences: list[Difference] = []
        """Of all environments of the run so far."""
        self.findings: list[Finding] = []
        self.points: list[Point] = []
        self.step = 0
        self.num_executed = 0
        self.num_skipped = 0
        """Requests that are not executed again: failed on the server's account, or samples."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.stop()

    @property
    def stopped(self) -> bool:
        """Whether there is a finding to stop at."""
        return bool(self.findings) and not self._keep_going

    async def begin(self, until: int | None = None, *, newest: bool = False) -> None:
        """Make the adapter: as its add_lora made it, or (`newest`) from the newest saved state that holds no request
        after position `until`."""
        first = self._history.calls[0]
        marks = self._history.marks(until if newest else first.position)
        by_position = {call.position: call for call in self._history.calls}
        assert marks.origin.causation is not None
        call = by_position[marks.origin.causation]
        await self._follow(call)
        assert self._session is not None
        report = await self._session.begin(marks.origin)
        self.step, self._reached = report.step, marks.boundary
        recorded = marks.origin.event.state_digest  # type: ignore[union-attr]
        self.findings += self.comparison.state(call, recorded, report.state_digest, self.step)

    async def advance(
        self, until: int | None = None, *, change: Change | None = None, training_only: bool = False
    ) -> None:
        """Execute what comes next, up to the request at position `until`; ends early at a finding, see `stopped`.

        With `change` optim_steps have other settings, and nothing is compared any more. `training_only`: leave out what
        has no effect on the state.
        """
        left = [
            call
            for call in self._history.calls
            if call.position > self._reached and (until is None or call.position <= until)
        ]
        done = 0
        for group in self._groups(left, training_only):
            if self.stopped:
                return
            await self._follow(group[0])
            if group[0].kind == "load":
                await self._load(group[0], compare=change is None)
            elif group[0].kind == "save":
                await self._compare_saved(group[0], group[0].result, compare=change is None)
            else:
                await self._execute(group, change)
            self._reached = group[-1].position
            done += len(group)
            self._tell(f"step {self.step}", done, len(left))

    async def snapshot(self) -> AdapterState:
        """The state as it is now; gradients are no part of it."""
        assert self._session is not None
        return await self._session.snapshot()

    def _groups(self, calls: Sequence[Call], training_only: bool) -> Iterator[list[Call]]:
        """What can be executed, in order: up to an optim_step together, or one load or save."""
        group: list[Call] = []
        tokens = 0
        for call in calls:
            if call.result is None and call.kind != "sample":
                break  # answered in order: nothing after it is
            if call.kind in ("add_lora", "remove_lora"):
                continue
            if self._stays(call, training_only):
                self.num_skipped += 1
                continue
            alone = call.kind not in TRAINING
            changed = group and call.environment != group[-1].environment
            if group and (alone or changed or tokens >= BATCH_TOKENS):
                yield group
                group, tokens = [], 0
            group.append(call)
            tokens += getattr(call.asked, "num_tokens", 0)
            if alone or call.kind == "optim_step":
                yield group
                group, tokens = [], 0
        if group:
            yield group

    def _stays(self, call: Call, training_only: bool) -> bool:
        """Whether its result is taken from the log and not executed again."""
        answer = call.answer
        if isinstance(answer, kinds.Failed):
            # What an executor refused it refuses again; what broke elsewhere cannot be broken again.
            return call.kind not in TRAINING or answer.category == "server" or answer.batch is None
        if call.kind == "sample":
            return training_only or not self._samples or answer is None
        return training_only and call.kind in ("forward", "save")

    async def _execute(self, group: list[Call], change: Change | None) -> None:
        assert self._session is not None
        outcomes = await self._session.run(group, change)
        for call, outcome in zip(group, outcomes, strict=True):
            self.num_executed += 1
            if isinstance(outcome, OptimStepDone):
                self.step = outcome.step
            if change is None and not self.stopped:
                self.findings += self.comparison.findings(call, outcome, self.step)
            self._note(call, outcome)
        if change is None and isinstance(outcomes[-1], OptimStepDone):
            await self._compare_checkpoints(group[-1])

    def _note(self, call: Call, outcome: Outcome) -> None:
        """Keep what the curve and a later environment need."""
        match call.asked, call.answer, outcome:
            case kinds.ForwardBackwardRequested(), kinds.ForwardBackwardCompleted() as event, Passed():
                recorded, replayed, tokens = self._losses
                self._losses = (recorded + event.loss, replayed + outcome.loss, tokens + event.num_tokens)
                self._since.append(call)
            case kinds.OptimStepRequested(), answer, OptimStepDone():
                recorded, replayed, tokens = self._losses
                self.points.append(
                    Point(
                        step=outcome.step,
                        recorded=per_token(recorded, tokens) if isinstance(answer, kinds.OptimStepCompleted) else None,
                        replayed=per_token(replayed, tokens),
                    )
                )
                self._cleared()
            case kinds.OptimStepRequested(), _, UnitFailed():
                self._cleared()

    def _cleared(self) -> None:
        self._losses = (0.0, 0.0, 0)
        self._since.clear()

    async def _load(self, call: Call, *, compare: bool) -> None:
        assert self._session is not None and isinstance(call.answer, kinds.LoadCompleted)
        report = await self._session.make(call.request.recorded)
        self.step = report.step
        self._cleared()
        self.num_executed += 1
        if compare:
            # What a checkpoint holds are bits, wherever it is loaded: from here on they can be compared again.
            self.comparison.exact = not self._now()
            self.findings += self.comparison.state(call, call.answer.state_digest, report.state_digest, self.step)
            await self._compare_checkpoints(call)

    async def _compare_checkpoints(self, call: Call) -> None:
        for each in self._checkpoints.get(call.position, ()):
            await self._compare_saved(call, each, compare=True)

    async def _compare_saved(self, call: Call, saved: Entry | None, *, compare: bool) -> None:
        """A checkpoint of this place holds this state."""
        assert saved is not None and self._session is not None
        if not compare or not self.comparison.exact:
            return
        event = saved.recorded.event
        assert isinstance(event, kinds.SaveCompleted | kinds.CheckpointWritten)
        try:
            stored = blob_of(self._log, saved.recorded.blobs["weights"])
        except Compacted:
            if isinstance(event, kinds.SaveCompleted):
                raise
            return  # a recovery point that was superseded since the run was read
        state = await self._session.snapshot()
        self.comparison.num_compared += 2
        for recorded, found in ((event.state_digest, state.digest), (stored, state.weights)):
            if recorded != found:
                self.findings.append(
                    Finding(
                        what="checkpoint",
                        position=saved.position,
                        seq=call.request.recorded.seq,
                        kind=call.kind,
                        step=self.step,
                        recorded=event.state_digest,
                        found=state.digest if isinstance(found, str) else "other weights",
                    )
                )
                return

    # ---- environments ----------------------------------------------------------------------------------------------

    def _now(self) -> list[Difference]:
        """How the environment of the log and the one that runs here differ; not empty either where no bits are
        promised."""
        assert self._recorded is not None and self.environment is not None
        found = differences(self._recorded, self.environment)
        if not found and not self._recorded.exact:
            found = [Difference(fact="exact", recorded="false", found="false")]
        return found

    async def _follow(self, call: Call) -> None:
        """Have an executor in the environment in which the log has this request, if it can be had."""
        if call.environment is None:
            return
        recorded = self._history.environment(call.environment)
        if self._recorded is not None and not differences(self._recorded, recorded):
            return
        state = None
        if self._session is not None:
            state = await self._session.snapshot()
            await self._session.stop()
        kind, options = self._choice.of(recorded, foreign=self._log.foreign)
        self._tell(f"starting {kind}", 0, 1)
        self._session = Session(self._log, self._history.run, kind, options)
        self.environment = await self._session.start()
        if not self._any_model:
            require_same(f"run {self._history.run}", base_model_of(recorded), base_model_of(self.environment))
        self._recorded = recorded
        self.comparison.tolerance = tolerance_of(self.environment.facts.get("dtype"), self._rtol)
        # Bits that were lost do not come back with the environment.
        now = self._now()
        self.differences += [each for each in now if each not in self.differences]
        self.comparison.exact = self.comparison.exact and not now
        if state is not None:
            await self._session.load(state, with_optimizer=True)
            if self._since:
                await self._session.run(self._since)
