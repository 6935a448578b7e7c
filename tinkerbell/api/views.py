"""Rows and events of the log as the answers of `/v1`. Pure.

Nothing is filled in: a result that lacks what it must have is Corrupt, and a number JSON cannot carry fails
the future by name.
"""

import math
from datetime import UTC, datetime

import msgspec
import numpy as np

from tinkerbell import wire
from tinkerbell.api.arrays import NotFinite, floats, likeliest, table, with_gaps
from tinkerbell.errors import Corrupt
from tinkerbell.events import kinds
from tinkerbell.events.rows import AdapterRow, CheckpointRow, FutureRow, RunPoint, UsageRow
from tinkerbell.types import DatumOutputs, PromptScores, SampledSequence

_REDACTED = frozenset({"key_hash"})
"""Fields of events that never leave the server, not even to their owner."""

NOT_FINITE = wire.Failure(
    category="user",
    code="not-finite",
    message="The result has numbers that are not finite (NaN or infinity): the training has diverged. The log"
    " has it as it was computed.",
)


def rfc3339(at_us: int) -> str:
    """`2026-11-22T10:20:30.123456Z`."""
    at = datetime.fromtimestamp(at_us // 1_000_000, UTC).replace(microsecond=at_us % 1_000_000)
    return at.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def submitted(request: kinds.Recorded, place: int | None) -> wire.Future:
    """The future of a request just committed."""
    return wire.Future(
        id=request.position,
        kind=kinds.kind_of(request.event),
        state="pending",
        adapter_id=request.adapter,
        seq=request.seq,
        created_at=rfc3339(request.at_us),
        place=place,
    )


def future(row: FutureRow, *, place: int | None) -> wire.Future:
    """A future without its result."""
    return wire.Future(
        id=row.id,
        kind=row.kind,
        state=row.state,
        adapter_id=row.adapter,
        seq=row.seq,
        created_at=rfc3339(row.created_us),
        finished_at=None if row.done_us is None else rfc3339(row.done_us),
        cost_us=row.cost_us if row.state != "pending" else None,
        place=place,
    )


def unreadable(row: FutureRow, why: str) -> wire.Future:
    """A future whose answer is there and cannot be read: for its caller it has failed."""
    message = f"The answer of request {row.id} cannot be read: {why}"
    failure = wire.Failure(category="server", code="corrupt", message=message)
    return msgspec.structs.replace(future(row, place=None), state="failed", error=failure)


def answered(row: FutureRow, result: kinds.Recorded, body: kinds.Body | None) -> wire.Future:
    """A future with its result or failure. Raises Corrupt where the body is missing."""
    if isinstance(result.event, kinds.Unreadable):
        return unreadable(row, result.event.why)
    bare = future(row, place=None)
    if isinstance(result.event, kinds.Failed):
        failed = result.event
        failure = wire.Failure(category=failed.category, code=failed.code, message=failed.message)
        return msgspec.structs.replace(bare, error=failure)
    try:
        return msgspec.structs.replace(bare, result=_result(result, body))
    except NotFinite:
        return msgspec.structs.replace(bare, state="failed", error=NOT_FINITE)


def _result(result: kinds.Recorded, body: kinds.Body | None) -> wire.ResultBody:
    match result.event:
        case kinds.ForwardCompleted() | kinds.ForwardBackwardCompleted() as done:
            if not isinstance(body, kinds.LogprobsBody):
                raise Corrupt(f"event {result.position} has no logprobs")
            num_logprobs, num_targets = sum(len(logprobs) // 4 for logprobs in body.logprobs), done.num_targets
            if num_logprobs != done.num_tokens * num_targets:
                raise Corrupt(
                    f"event {result.position} has {num_logprobs} logprobs for {num_targets} targets of"
                    f" {done.num_tokens} tokens"
                )
            return wire.ForwardBackwardResult(
                loss=_number(done.loss),
                metrics={name: _number(value) for name, value in done.metrics.items()},
                logprobs=[floats(logprobs) for logprobs in body.logprobs],
                num_tokens=done.num_tokens,
                num_targets=num_targets,
                outputs=_outputs(result.position, body, num_targets),
            )
        case kinds.SampleCompleted() as done:
            if not isinstance(body, kinds.SamplesBody):
                raise Corrupt(f"event {result.position} has no samples")
            return _samples(result.position, done, body)
        case kinds.OptimStepCompleted() as done:
            return wire.OptimStepResult(
                step=done.step, grad_norm=_number(done.grad_norm), state_digest=done.state_digest
            )
        case kinds.AddLoraCompleted() as done:
            if result.adapter is None:
                raise Corrupt(f"event {result.position} names no adapter")
            return wire.AddLoraResult(
                adapter_id=result.adapter,
                num_parameters=done.num_parameters,
                step=done.step,
                state_digest=done.state_digest,
            )
        case kinds.SaveCompleted() as done:
            return wire.SaveResult(
                checkpoint_id=done.checkpoint, name=done.name, step=done.step, num_bytes=done.num_bytes
            )
        case kinds.LoadCompleted() as done:
            return wire.LoadResult(checkpoint_id=done.checkpoint, step=done.step, state_digest=done.state_digest)
        case kinds.RemoveLoraCompleted():
            return wire.RemoveLoraResult()
        case other:
            raise Corrupt(f"event {result.position} ({kinds.type_of(other)}) is no result")


def _outputs(position: int, body: kinds.LogprobsBody, num_targets: int) -> list[wire.OutputsBody] | None:
    if not isinstance(body, kinds.OutputsBody) or not body.outputs:
        return None
    if len(body.outputs) != len(body.logprobs):
        raise Corrupt(f"event {position} has outputs of {len(body.outputs)} data for {len(body.logprobs)}")
    lengths = (len(logprobs) // (4 * num_targets) for logprobs in body.logprobs)
    return [_datum_outputs(position, datum, n) for datum, n in zip(body.outputs, lengths, strict=True)]


def _datum_outputs(position: int, datum: DatumOutputs, n: int) -> wire.OutputsBody:
    """Of a datum of `n` tokens."""
    entropy, logsumexp = table(position, datum.entropy, "<f4", n, 1), table(position, datum.logsumexp, "<f4", n, 1)
    logits = table(position, datum.logits, "<f4", n)
    top_tokens, top_logprobs = likeliest(position, datum.top_tokens, datum.top_logprobs, n)
    return wire.OutputsBody(
        entropy=None if entropy is None else entropy[:, 0].tolist(),
        logsumexp=None if logsumexp is None else logsumexp[:, 0].tolist(),
        top_tokens=top_tokens,
        top_logprobs=top_logprobs,
        logits=None if logits is None else wire.LogitsBody(shape=logits.shape, data=logits.tobytes()),
    )


def _samples(position: int, done: kinds.SampleCompleted, body: kinds.SamplesBody) -> wire.SampleResult:
    scores = body.prompt_scores or PromptScores()
    n = done.num_prompt_tokens
    top_tokens, top_logprobs = likeliest(position, scores.top_tokens, scores.top_logprobs, n - 1)
    drawn_tokens, drawn_logprobs = likeliest(position, scores.drawn_tokens, scores.drawn_logprobs, n - 1)
    return wire.SampleResult(
        sequences=[_sequence(position, sequence) for sequence in body.sequences],
        prompt_logprobs=None if body.prompt_logprobs is None else floats(body.prompt_logprobs),
        step=done.step,
        prompt_top_tokens=top_tokens,
        prompt_top_logprobs=top_logprobs,
        prompt_target_logprobs=with_gaps(position, scores.target_logprobs, n),
        prompt_drawn_tokens=drawn_tokens,
        prompt_drawn_logprobs=drawn_logprobs,
    )


def _sequence(position: int, sequence: SampledSequence) -> wire.SequenceBody:
    tokens, logprobs = np.frombuffer(sequence.tokens, "<i4").tolist(), floats(sequence.logprobs)
    if len(tokens) != len(logprobs):
        raise Corrupt(f"event {position} has {len(tokens)} sampled tokens and {len(logprobs)} logprobs")
    top_tokens, top_logprobs = likeliest(position, sequence.top_tokens, sequence.top_logprobs, len(tokens))
    return wire.SequenceBody(
        tokens=tokens,
        logprobs=logprobs,
        stop_reason=sequence.stop_reason,
        top_tokens=top_tokens,
        top_logprobs=top_logprobs,
    )


def _number(value: float) -> float:
    if not math.isfinite(value):
        raise NotFinite
    return value


def adapter(row: AdapterRow) -> wire.Adapter:
    """GET /v1/adapters/{id}."""
    return wire.Adapter(
        id=row.id,
        name=row.name,
        base_model=row.base_model,
        lora=row.lora,
        seed=row.seed,
        state=row.state,
        num_parameters=row.num_parameters,
        step=row.step,
        next_seq=row.next_seq,
        last_loss=_finite_or_none(row.last_loss),
        created_at=rfc3339(row.created_us),
        parent_checkpoint=row.checkpoint,
    )


def checkpoint(row: CheckpointRow) -> wire.Checkpoint:
    """GET /v1/checkpoints/{id}."""
    return wire.Checkpoint(
        id=row.id,
        name=row.name,
        adapter_id=row.adapter,
        step=row.step,
        lora=row.lora,
        num_bytes=row.num_bytes,
        state_digest=row.state_digest,
        created_at=rfc3339(row.created_us),
    )


def log_event(recorded: kinds.Recorded) -> wire.LogEvent:
    """One event as its tenant may see it."""
    data = kinds.facts_of(recorded.event)
    return wire.LogEvent(
        position=recorded.position,
        at=rfc3339(recorded.at_us),
        type=kinds.type_of(recorded.event),
        adapter_id=recorded.adapter,
        seq=recorded.seq,
        causation=recorded.causation,
        data={name: value for name, value in data.items() if name not in _REDACTED},
        hash=recorded.hash,
    )


def run_point(row: RunPoint) -> wire.RunPoint:
    """One optimizer step."""
    per_token = row.loss_sum / row.num_tokens if row.num_tokens else None
    return wire.RunPoint(
        step=row.step,
        at=rfc3339(row.at_us),
        learning_rate=row.learning_rate,
        grad_norm=_finite_or_none(row.grad_norm),
        loss_per_token=_finite_or_none(per_token),
        num_tokens=row.num_tokens,
        state_digest=row.state_digest,
    )


def _finite_or_none(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def usage_row(row: UsageRow) -> wire.UsageRow:
    """What one adapter used."""
    return wire.UsageRow(
        tenant=row.tenant,
        adapter_id=row.adapter,
        kind=row.kind,
        num_requests=row.num_requests,
        tokens_in=row.tokens_in,
        tokens_out=row.tokens_out,
        cost_us=row.cost_us,
    )
