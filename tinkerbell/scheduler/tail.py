"""What an adapter was asked since its last saved state: which requests to execute again, and whether they come to what
the log says."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tinkerbell.errors import OtherBaseModel
from tinkerbell.events import kinds
from tinkerbell.events.kinds import AnyResult, Recorded, kind_of
from tinkerbell.executors.port import ForwardBackwardDone, OptimStepDone, UnitFailed, UnitResult
from tinkerbell.scheduler.environments import Tolerance, relative
from tinkerbell.scheduler.results import logprobs_digest


@dataclass(frozen=True, slots=True)
class Committed:
    """A request that had an effect, and its result."""

    request: Recorded
    result: AnyResult

    def difference(self, found: Sequence[UnitResult]) -> str | None:
        """What is not as recorded when it was executed again; None if nothing. `found`: the answers of its units."""
        return next((self._said(*pair) for pair in self._compared(found) if pair[1] != pair[2]), None)

    def deviation(self, found: Sequence[UnitResult], tolerance: Tolerance, step: int) -> str | None:
        """What is further from the record than where no bits are promised it may be; None if nothing. `step`: optimizer
        steps behind the adapter."""
        if (outcome := self._outcome(found))[1] != outcome[2]:
            return self._said(*outcome)
        match self.result, *found:
            case kinds.ForwardBackwardCompleted(loss=before), *_:
                what, now, bound = "loss", sum(part.loss for part in _parts(found)), tolerance.loss(step)
            case kinds.OptimStepCompleted(grad_norm=before), OptimStepDone(grad_norm=now):
                what, bound = "gradient norm", tolerance.norm(step)
            case _:
                return None
        return None if relative(before, now) <= bound else f"{self._said(what, before, now)} (allowed: {bound:.2g})"

    def _said(self, what: str, before: object, now: object) -> str:
        kind = kind_of(self.request.event)
        return f"{kind} at position {self.request.position}, executed again: {what} {now}, recorded {before}"

    def _outcome(self, found: Sequence[UnitResult]) -> tuple[str, str, str]:
        failures = [outcome for outcome in found if isinstance(outcome, UnitFailed)]
        before = self.result.code if isinstance(self.result, kinds.Failed) else "done"
        return "outcome", before, failures[0].code if failures else "done"

    def _compared(self, found: Sequence[UnitResult]) -> Iterator[tuple[str, object, object]]:
        """(what, recorded, found), causes before their consequences."""
        yield self._outcome(found)
        match self.result, *found:
            case kinds.ForwardBackwardCompleted(logprobs_digest=digest), *_ if digest is not None:
                yield "logprobs digest", digest, logprobs_digest(row for part in _parts(found) for row in part.logprobs)
            case kinds.OptimStepCompleted() as event, OptimStepDone() as done:
                if event.gradient_digest is not None:
                    yield "gradient digest", event.gradient_digest, done.gradient_digest
                if event.weights_digest is not None:
                    yield "weights digest", event.weights_digest, done.weights_digest
                yield f"state digest of step {event.step}", event.state_digest, done.state_digest


def _parts(found: Sequence[UnitResult]) -> list[ForwardBackwardDone]:
    return [part for part in found if isinstance(part, ForwardBackwardDone)]


def committed_tail(events: Sequence[Recorded]) -> list[Committed]:
    """Of the requests and results after the boundary, those that had an effect, in order.

    An optim_step that failed on the caller's account may have cleared the gradient, so it is among them, unless it
    never came to an executor because that had another base model.
    """
    results = {recorded.causation: recorded.event for recorded in events if isinstance(recorded.event, kinds.Result)}
    tail = []
    for recorded in events:
        match results.get(recorded.position):
            case kinds.ForwardBackwardCompleted() | kinds.OptimStepCompleted() as result:
                tail.append(Committed(recorded, result))
            case kinds.OptimStepFailed(category="user") as failed if failed.code != OtherBaseModel.slug:
                tail.append(Committed(recorded, failed))
    return tail
