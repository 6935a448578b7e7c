"""What an adapter was asked since its last saved state: which requests to execute again, and whether they come to what
the log says."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tinkerbell.events import kinds
from tinkerbell.events.kinds import AnyResult, Recorded, kind_of
from tinkerbell.executors.port import ForwardBackwardDone, OptimStepDone, UnitFailed, UnitResult
from tinkerbell.scheduler.results import logprobs_digest


@dataclass(frozen=True, slots=True)
class Committed:
    """A request that had an effect, and its result."""

    request: Recorded
    result: AnyResult

    def difference(self, found: Sequence[UnitResult]) -> str | None:
        """What is not as recorded when it was executed again; None if nothing. `found`: the answers of its units."""
        for what, before, now in self._compared(found):
            if before != now:
                kind = kind_of(self.request.event)
                return f"{kind} at position {self.request.position}, executed again: {what} {now}, recorded {before}"
        return None

    def _compared(self, found: Sequence[UnitResult]) -> Iterator[tuple[str, object, object]]:
        """(what, recorded, found), causes before their consequences."""
        failures = [outcome for outcome in found if isinstance(outcome, UnitFailed)]
        before = self.result.code if isinstance(self.result, kinds.Failed) else "done"
        yield "outcome", before, failures[0].code if failures else "done"
        match self.result, *found:
            case kinds.ForwardBackwardCompleted(logprobs_digest=digest), *_ if digest is not None:
                parts = [part for part in found if isinstance(part, ForwardBackwardDone)]
                yield "logprobs digest", digest, logprobs_digest(row for part in parts for row in part.logprobs)
            case kinds.OptimStepCompleted() as event, OptimStepDone() as done:
                if event.gradient_digest is not None:
                    yield "gradient digest", event.gradient_digest, done.gradient_digest
                if event.weights_digest is not None:
                    yield "weights digest", event.weights_digest, done.weights_digest
                yield f"state digest of step {event.step}", event.state_digest, done.state_digest


def committed_tail(events: Sequence[Recorded]) -> list[Committed]:
    """Of the requests and results after the boundary, those that had an effect, in order.

    An optim_step that failed on the caller's account may have cleared the gradient, so it is among them.
    """
    results = {recorded.causation: recorded.event for recorded in events if isinstance(recorded.event, kinds.Result)}
    tail = []
    for recorded in events:
        match results.get(recorded.position):
            case (
                kinds.ForwardBackwardCompleted() | kinds.OptimStepCompleted() | kinds.OptimStepFailed(category="user")
            ) as result:
                tail.append(Committed(recorded, result))
    return tail
