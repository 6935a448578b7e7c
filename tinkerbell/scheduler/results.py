"""From an executor's answers to result events."""

import hashlib
import math
from collections.abc import Iterable

import msgspec

from tinkerbell.errors import ServerError
from tinkerbell.events import kinds
from tinkerbell.events.kinds import FAILED, AnyResult, Body, LogprobsBody, OutputsBody, SamplesBody
from tinkerbell.executors.port import ForwardBackwardDone, OptimStepDone, SampleDone, UnitResult
from tinkerbell.scheduler.pending import PendingRequest
from tinkerbell.types import Category, DatumOutputs, PromptScores


def stream_of(request: PendingRequest) -> str:
    """The stream a request's result belongs to."""
    return f"tenant/{request.tenant}" if request.adapter is None else f"adapter/{request.adapter}"


def combine(parts: Iterable[ForwardBackwardDone]) -> tuple[float, dict[str, float], OutputsBody]:
    """The chunks of one request, in order: losses and metrics add, logprobs and outputs follow one another in
    datum order."""
    loss = 0.0
    metrics: dict[str, float] = {}
    logprobs: list[bytes] = []
    outputs: list[DatumOutputs] = []
    for part in parts:
        loss += part.loss
        for name, value in part.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value
        logprobs.extend(part.logprobs)
        outputs.extend(part.outputs or ())
    return loss, metrics, OutputsBody(logprobs=logprobs, outputs=outputs)


def logprobs_digest(logprobs: Iterable[bytes]) -> str:
    """sha256 (hex) over the datums' logprobs, each behind its length: what ForwardBackwardCompleted records."""
    digest = hashlib.sha256()
    for values in logprobs:
        digest.update(len(values).to_bytes(8, "little"))
        digest.update(values)
    return digest.hexdigest()


def outputs_digest(outputs: Iterable[DatumOutputs]) -> str:
    """sha256 (hex) over all that was asked for, to compare two executions."""
    return hashlib.sha256(msgspec.msgpack.encode(list(outputs))).hexdigest()


def require_finite(answers: Iterable[UnitResult]) -> None:
    """Raises ServerError for an executor that says "done" with a number the log cannot hold (JSON has no NaN)."""
    for answer in answers:
        match answer:
            case ForwardBackwardDone():
                numbers = [answer.loss, *answer.metrics.values()]
            case OptimStepDone():
                numbers = [answer.grad_norm]
            case _:
                continue
        if not all(map(math.isfinite, numbers)):
            raise ServerError(f"the executor answered request {answer.request} with a number that is not finite")


def forward_done(request: PendingRequest, batch: str) -> tuple[AnyResult, Body]:
    """Result of a forward or forward_backward whose chunks all ran."""
    event = request.event
    assert isinstance(event, kinds.ForwardRequested | kinds.ForwardBackwardRequested)
    loss, metrics, body = combine(part for part in request.outcomes if isinstance(part, ForwardBackwardDone))
    cls = kinds.ForwardCompleted if request.kind == "forward" else kinds.ForwardBackwardCompleted
    completed = cls(
        batch=batch,
        cost_us=request.cost_us,
        loss=loss,
        metrics=metrics,
        num_tokens=event.num_tokens,
        num_targets=event.num_targets,
        logprobs_digest=logprobs_digest(body.logprobs),
    )
    return completed, body if request.kind == "forward" else LogprobsBody(logprobs=body.logprobs)


def optim_step_done(request: PendingRequest, done: OptimStepDone, batch: str) -> AnyResult:
    return kinds.OptimStepCompleted(
        batch=batch,
        cost_us=request.cost_us,
        step=done.step,
        grad_norm=done.grad_norm,
        state_digest=done.state_digest,
        gradient_digest=done.gradient_digest,
        weights_digest=done.weights_digest,
    )


def sample_done(request: PendingRequest, batch: str, step: int) -> tuple[AnyResult, Body]:
    """Result of a sample whose chunks all ran. `step`: optimizer steps behind the weights that sampled."""
    event = request.event
    assert isinstance(event, kinds.SampleRequested)
    parts = [part for part in request.outcomes if isinstance(part, SampleDone)]
    sequences = [sequence for part in parts for sequence in part.sequences]
    completed = kinds.SampleCompleted(
        batch=batch,
        cost_us=request.cost_us,
        step=step,
        num_prompt_tokens=event.num_tokens,
        num_sampled_tokens=sum(len(sequence.tokens) // 4 for sequence in sequences),
    )
    scores = _joined([part.prompt_scores for part in parts if part.prompt_scores is not None], event.num_tokens - 1)
    return completed, SamplesBody(sequences=sequences, prompt_logprobs=parts[0].prompt_logprobs, prompt_scores=scores)


def _joined(parts: list[PromptScores], num_rows: int) -> PromptScores | None:
    """What units found of one prompt, in order: the first has all but the draws, which go beside one another in each
    row."""
    if len(parts) < 2:
        return parts[0] if parts else None

    def beside(columns: list[bytes | None]) -> bytes | None:
        found = [column for column in columns if column is not None]
        if not found:
            return None
        widths = [len(column) // num_rows if num_rows else 0 for column in found]
        return b"".join(
            column[row * width : (row + 1) * width]
            for row in range(num_rows)
            for column, width in zip(found, widths, strict=True)
        )

    return msgspec.structs.replace(
        parts[0],
        drawn_tokens=beside([part.drawn_tokens for part in parts]),
        drawn_logprobs=beside([part.drawn_logprobs for part in parts]),
    )


def failed(request: PendingRequest, category: Category, code: str, message: str, batch: str | None) -> AnyResult:
    """The failure of a request of any kind."""
    return FAILED.get(request.kind, kinds.RequestFailed)(
        batch=batch, cost_us=request.cost_us, category=category, code=code, message=message
    )
