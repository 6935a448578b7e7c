"""A request executed again against what the log says it came to: to the bit, or within stated bounds."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tinkerbell.events import kinds
from tinkerbell.events.kinds import LogprobsBody, OutputsBody, SamplesBody
from tinkerbell.executors.port import OptimStepDone, SampleDone, UnitFailed
from tinkerbell.replay.findings import Finding, finding, mean_difference
from tinkerbell.replay.history import Call
from tinkerbell.replay.log import Log, body_of
from tinkerbell.replay.session import Outcome, Passed
from tinkerbell.scheduler.environments import Tolerance, relative
from tinkerbell.scheduler.results import logprobs_digest, outputs_digest
from tinkerbell.types import DatumOutputs


@dataclass(slots=True)
class Deviations:
    """The largest seen so far; 0 where everything is equal."""

    loss: float = 0.0
    """Relative."""
    logprobs: float = 0.0
    """Mean over a request, nats."""
    grad_norm: float = 0.0
    """Relative."""


@dataclass(slots=True)
class Comparison:
    """Compares outcomes with results, in the order of the requests."""

    log: Log
    tolerance: Tolerance
    exact: bool = True
    """Whether every bit must be the same."""
    num_compared: int = 0
    """Digests and numbers."""
    deviations: Deviations = field(default_factory=Deviations)

    def findings(self, call: Call, outcome: Outcome, step: int) -> Iterator[Finding]:
        """What differs. `step`: optimizer steps behind the adapter, this request's included."""
        match call.answer, outcome:
            case kinds.Failed(code=code), UnitFailed(code=again):
                yield from self._same("outcome", call, f"failed: {code}", f"failed: {again}", step)
            case kinds.Failed(code=code), _:
                yield finding("outcome", call, f"failed: {code}", "done", step=step)
            case _, UnitFailed(code=again, message=message):
                yield finding("outcome", call, "done", f"failed: {again}: {message}", step=step)
            case kinds.ForwardCompleted() | kinds.ForwardBackwardCompleted() as event, Passed():
                yield from self._passed(call, event, outcome, step)
            case kinds.OptimStepCompleted() as event, OptimStepDone():
                yield from self._stepped(call, event, outcome, step)
            case kinds.SampleCompleted(), SampleDone():
                # The slightest rounding may choose another token, and all that follow it.
                if self.exact:
                    yield from self._sampled(call, outcome, step)
            case _:
                raise AssertionError(f"{call.kind} came to {type(outcome).__name__}")

    def state(self, call: Call, recorded: str, found: str, step: int) -> Iterator[Finding]:
        """The digest of an adapter's state; only bits can be compared."""
        if self.exact:
            yield from self._same("state", call, recorded, found, step)

    def _same(self, what: Any, call: Call, recorded: Any, found: Any, step: int) -> Iterator[Finding]:
        self.num_compared += 1
        if recorded != found:
            yield finding(what, call, recorded, found, step=step)

    def _near(self, what: Any, call: Call, pair: tuple[float, float], bound: float, step: int) -> Iterator[Finding]:
        self.num_compared += 1
        if not relative(*pair) <= bound:
            yield finding(what, call, pair[0], pair[1], step=step)

    def _passed(
        self,
        call: Call,
        event: kinds.ForwardCompleted | kinds.ForwardBackwardCompleted,
        found: Passed,
        step: int,
    ) -> Iterator[Finding]:
        self.deviations.loss = max(self.deviations.loss, relative(event.loss, found.loss))
        assert call.result is not None
        if self.exact:
            yield from self._same("loss", call, event.loss, found.loss, step)
            yield from self._same("metrics", call, _sorted(event.metrics), _sorted(found.metrics), step)
            recorded = event.logprobs_digest
            if recorded is None:
                recorded = logprobs_digest(self._logprobs(call))
            yield from self._same("logprobs", call, recorded, logprobs_digest(found.logprobs), step)
            if found.outputs:
                before, now = map(outputs_digest, (self._outputs(call), found.outputs))
                yield from self._same("outputs", call, before, now, step)
            return
        yield from self._near("loss", call, (event.loss, found.loss), self.tolerance.loss(step), step)
        apart = mean_difference(self._logprobs(call), found.logprobs)
        self.deviations.logprobs = max(self.deviations.logprobs, apart)
        self.num_compared += 1
        if not apart <= self.tolerance.loss(step):
            bound = f"within {self.tolerance.loss(step):.2g} nats on average"
            yield finding("logprobs", call, bound, apart, step=step)

    def _stepped(
        self, call: Call, event: kinds.OptimStepCompleted, found: OptimStepDone, step: int
    ) -> Iterator[Finding]:
        self.deviations.grad_norm = max(self.deviations.grad_norm, relative(event.grad_norm, found.grad_norm))
        if not self.exact:
            yield from self._near(
                "grad_norm", call, (event.grad_norm, found.grad_norm), self.tolerance.norm(step), step
            )
            return
        # Along the way of causes: a gradient that is not the same explains what follows from it.
        if event.gradient_digest is not None:
            yield from self._same("gradient", call, event.gradient_digest, found.gradient_digest, step)
        yield from self._same("grad_norm", call, event.grad_norm, found.grad_norm, step)
        if event.weights_digest is not None:
            yield from self._same("weights", call, event.weights_digest, found.weights_digest, step)
        yield from self._same("state", call, event.state_digest, found.state_digest, step)

    def _sampled(self, call: Call, found: SampleDone, step: int) -> Iterator[Finding]:
        assert call.result is not None
        body = body_of(self.log, call.result)
        assert isinstance(body, SamplesBody)
        for number, (before, now) in enumerate(zip(body.sequences, found.sequences, strict=True)):
            if before != now:
                yield finding("sample", call, f"sample {number}", "other tokens or logprobs", step=step)
            self.num_compared += 1
        if body.prompt_logprobs is not None or body.prompt_scores is not None:
            self.num_compared += 1
            if (body.prompt_logprobs, body.prompt_scores) != (found.prompt_logprobs, found.prompt_scores):
                yield finding("sample", call, "the prompt's logprobs", "others", step=step)

    def _outputs(self, call: Call) -> list[DatumOutputs]:
        assert call.result is not None
        body = body_of(self.log, call.result)
        assert isinstance(body, OutputsBody)
        return body.outputs

    def _logprobs(self, call: Call) -> list[bytes]:
        assert call.result is not None
        body = body_of(self.log, call.result)
        assert isinstance(body, LogprobsBody)
        return body.logprobs


def _sorted(metrics: dict[str, float]) -> str:
    """The log has them by name, an executor in any order."""
    return ", ".join(f"{name} {metrics[name]!r}" for name in sorted(metrics))
