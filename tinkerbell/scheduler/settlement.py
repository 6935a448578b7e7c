"""What a batch came to: who is charged what, and which requests have their result."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tinkerbell.errors import InvalidRequest
from tinkerbell.events import codec
from tinkerbell.events.kinds import AnyResult, Body
from tinkerbell.executors.port import (
    ForwardBackwardDone,
    OptimStepDone,
    SampleDone,
    UnitFailed,
    UnitResult,
)
from tinkerbell.scheduler import results
from tinkerbell.scheduler.batching import Plan
from tinkerbell.scheduler.cost import CostModel, divide_us, features, learn
from tinkerbell.scheduler.fair_share import FairShare
from tinkerbell.scheduler.pending import PendingRequest
from tinkerbell.scheduler.residency import Residency
from tinkerbell.types import AdapterId


@dataclass(frozen=True, slots=True)
class Answer:
    """A request's result, ready to be written."""

    request: PendingRequest
    event: AnyResult
    body: Body | None = None
    blobs: dict[str, bytes] = field(default_factory=dict)


class Settlement:
    """Turns measured batches into charges and answers, and teaches the cost model."""

    def __init__(self, cost: CostModel, shares: FairShare, residency: Residency) -> None:
        self._cost = cost
        self._shares = shares
        self._residency = residency

    def charge(
        self, plan: Plan, outcomes: Sequence[UnitResult | None], busy_us: int, own_us: Sequence[int] | None = None
    ) -> list[tuple[int, int]]:
        """Divide `busy_us` over the plan's requests, (position, microseconds): what each had to itself, and what they
        shared in proportion to what their units needed of it; correct the shares, which were charged estimates.
        `own_us`: as in BatchResult."""
        needed = [
            features(work.request, work.chunk, self._residency.num_parameters(work.request.adapter), outcome)
            for work, outcome in zip(plan.works, outcomes, strict=True)
        ]
        parts = divide_us(busy_us, needed, own_us, self._cost)
        charges: dict[int, int] = {}
        for work, part in zip(plan.works, parts, strict=True):
            request = work.request
            request.cost_us += part
            charges[request.position] = charges.get(request.position, 0) + part
            self._shares.correct(request.tenant, request.adapter or "", part - work.estimated_us)
        learn(self._cost, busy_us, needed, own_us)
        return list(charges.items())

    def refund(self, plan: Plan) -> None:
        """The batch came to nothing."""
        for work in plan.works:
            self._shares.correct(work.request.tenant, work.request.adapter or "", -work.estimated_us)

    def answers(self, plan: Plan, batch: str, outcomes: Sequence[UnitResult]) -> list[Answer]:
        """Results of the requests that ended with this batch, in the order of its units.

        Chunks of requests that go on are kept with them; adapters that stepped are noted.
        """
        answers: dict[int, Answer] = {}
        unrecorded: set[AdapterId] = set()
        """Adapters with gradients of a request that failed after it had run."""
        for work, outcome in zip(plan.works, outcomes, strict=True):
            request = work.request
            request.batch = batch
            assert outcome.request == request.position, "results are not in the order of the batch"
            if request.position in answers:
                continue  # an earlier chunk of it failed
            match outcome:
                case OptimStepDone() if request.adapter in unrecorded:
                    # It stepped along a gradient that the log does not have: it runs again on the restored adapter.
                    continue
                case UnitFailed():
                    event = results.failed(request, outcome.category, outcome.code, outcome.message, batch)
                    answers[request.position] = Answer(request, event)
                case ForwardBackwardDone():
                    request.outcomes.append(outcome)
                    if work.last:
                        made = Answer(request, *results.forward_done(request, batch))
                        answer = answers[request.position] = self.recordable(made, batch)
                        if answer is not made and request.kind == "forward_backward":
                            assert request.adapter is not None
                            unrecorded.add(request.adapter)
                case OptimStepDone():
                    self._stepped(request, outcome)
                    answers[request.position] = Answer(request, results.optim_step_done(request, outcome, batch))
                case SampleDone():
                    request.outcomes.append(outcome)
                    if work.last:
                        step = self._residency.step(request.adapter)
                        answers[request.position] = Answer(request, *results.sample_done(request, batch, step))
        for work in plan.works:
            if work.request.adapter in unrecorded and work.request.position not in answers:
                work.request.outcomes.clear()
        for adapter in unrecorded:
            self._residency.forget(adapter)
        return list(answers.values())

    def recordable(self, answer: Answer, batch: str) -> Answer:
        """The answer, or where the log could not give it back a failure that says why: each chunk's numbers may be
        finite, and their sum not."""
        try:
            codec.encode_event(answer.event)
        except InvalidRequest as exc:
            message = f"the result cannot be recorded: {exc.detail}"
            return Answer(answer.request, results.failed(answer.request, "user", "non-finite", message, batch))
        return answer

    def _stepped(self, request: PendingRequest, done: OptimStepDone) -> None:
        assert request.adapter is not None and request.seq is not None
        self._residency[request.adapter].stepped(request.seq, request.position, done.step, done.state_digest)
