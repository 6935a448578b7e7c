"""A fork as requests to a running server: a new adapter with the run's past, in the log like any other."""

from collections.abc import Iterator

import msgspec

from tinkerbell import wire
from tinkerbell.events import kinds
from tinkerbell.events.base_models import BaseModel, require_same
from tinkerbell.events.kinds import ForwardBackwardBody
from tinkerbell.replay.curves import Point, curve, per_token
from tinkerbell.replay.findings import Finding, finding
from tinkerbell.replay.fork import forkable, parse_settings
from tinkerbell.replay.history import Call, History, read_history
from tinkerbell.replay.integrity import Tell
from tinkerbell.replay.log import Log, body_of
from tinkerbell.replay.session import Change
from tinkerbell.sdk import Adapter, Client
from tinkerbell.sdk.errors import RequestFailed
from tinkerbell.sdk.future import Future
from tinkerbell.types import Datum

Sent = wire.ForwardBackwardResult | wire.OptimStepResult


class ServerFork(msgspec.Struct, frozen=True, kw_only=True):
    """A fork on a server."""

    run: str
    """Whose past it has."""
    adapter: str
    """The fork: an adapter like any other."""
    seq: int
    at_step: int
    changed: dict[str, float]
    checkpoint: str | None
    """Saved state of the run that it began with; None: it was made from the seed."""
    num_executed_before: int
    """Requests of the past that were sent: those since that state."""
    past: list[Point]
    points: list[Point]
    findings: list[Finding]
    """Where the past did not come out as recorded: then nothing was sent after it."""


def fork_on_server(
    client: Client,
    log: Log,
    run: str,
    at: str,
    settings: dict[str, str],
    *,
    until: str | None = None,
    name: str | None = None,
    tell: Tell = lambda _what, _done, _total: None,
) -> ServerFork:
    """Begin with the newest checkpoint saved at or before `at` (or the seed), send what came since again, compare its
    digests, and go on with the run's later requests under these settings.

    The client's key must be of the run's tenant, the server be the one whose log this is. Raises what the SDK raises,
    and as `replay.fork` does.
    """
    change = parse_settings(settings)
    history = read_history(log, run)
    call, end = forkable(history, at, until)
    served = client.models()[0]
    require_same(
        f"run {history.run}",
        BaseModel(name=history.made.base_model, hash=history.made.base_hash),
        BaseModel(name=served.name, hash=served.hash),
    )
    marks = history.marks(call.position, users_own=True)
    adapter, checkpoint = _begin(client, history, marks.origin.event, marks.origin.causation, name)
    past = list(_training(history, marks.boundary, call.position))
    sent = [_send(log, each, adapter, None) for each in past]
    findings: list[Finding] = []
    for number, (each, future) in enumerate(zip(past, sent, strict=True)):
        tell("past", number, len(past))
        findings += _compare(each, future)
    points: list[Point] = []
    if not findings:
        later = list(_training(history, call.position, end))
        futures = [_send(log, each, adapter, change) for each in later]
        points = list(_points(past, sent, later, futures, tell))
    assert call.request.recorded.seq is not None
    shared = curve(history, call.position)
    return ServerFork(
        run=history.run,
        adapter=adapter.id,
        seq=call.request.recorded.seq,
        at_step=shared[-1].step if shared else 0,
        changed={key: float(value) for key, value in settings.items()},
        checkpoint=checkpoint,
        num_executed_before=len(past),
        past=shared,
        points=points,
        findings=findings,
    )


def _begin(
    client: Client, history: History, origin: kinds.AnyRead, made_by: int | None, name: str | None
) -> tuple[Adapter, str | None]:
    """(the new adapter, the checkpoint it is made from)."""
    if isinstance(origin, kinds.SaveCompleted):
        checkpoint: str | None = origin.checkpoint
        with_optimizer = True
    else:
        asked = next(each.asked for each in history.calls if each.position == made_by)
        assert isinstance(asked, kinds.AddLoraRequested | kinds.LoadRequested)
        checkpoint, with_optimizer = asked.checkpoint, asked.with_optimizer
    if checkpoint is not None:
        return client.add_lora(checkpoint=checkpoint, with_optimizer=with_optimizer, name=name), checkpoint
    lora = history.made.lora
    seed = history.made.seed
    made = client.add_lora(rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=seed, name=name)
    return made, None


def _training(history: History, after: int, until: int | None) -> Iterator[Call]:
    """What has an effect on weights, moments or gradients."""
    for call in history.calls:
        if call.position <= after or (until is not None and call.position > until):
            continue
        match call.answer:
            case kinds.ForwardBackwardCompleted() | kinds.OptimStepCompleted():
                yield call
            case kinds.OptimStepFailed(category="user", batch=batch) if batch is not None:
                # It may have dropped a gradient that was not finite.
                yield call


def _send(log: Log, call: Call, adapter: Adapter, change: Change | None) -> Future[Sent]:
    asked = call.asked
    if isinstance(asked, kinds.OptimStepRequested):
        adam = asked.adam if change is None else change(asked.adam)
        return adapter.optim_step(**msgspec.structs.asdict(adam))
    assert isinstance(asked, kinds.ForwardBackwardRequested)
    body = body_of(log, call.request)
    assert isinstance(body, ForwardBackwardBody)
    return adapter.forward_backward(list(map(_datum, body.data)), loss=asked.loss.name, config=asked.loss.config)


def _datum(datum: Datum) -> wire.DatumBody:
    """As it travels. A float32 is the same after a way through JSON."""
    return wire.DatumBody(
        tokens=list(memoryview(datum.tokens).cast("i")),
        targets=list(memoryview(datum.targets).cast("i")),
        loss_inputs={name: list(memoryview(values).cast("f")) for name, values in datum.loss_inputs.items()},
    )


def _result(future: Future[Sent]) -> Sent | None:
    """None where it failed on the caller's account: a step that would not have been finite, say."""
    try:
        return future.result()
    except RequestFailed as exc:
        if exc.category == "server":
            raise
        return None


def _compare(call: Call, future: Future[Sent]) -> Iterator[Finding]:
    result = _result(future)
    match call.answer, result:
        case kinds.OptimStepCompleted() as event, wire.OptimStepResult():
            if event.state_digest != result.state_digest:
                yield finding("state", call, event.state_digest, result.state_digest, step=event.step)
        case kinds.ForwardBackwardCompleted() as event, wire.ForwardBackwardResult():
            if event.loss != result.loss:
                yield finding("loss", call, event.loss, result.loss)
        case kinds.Failed(), None:
            pass
        case _:
            failed = isinstance(call.answer, kinds.Failed)
            yield finding("outcome", call, "failed" if failed else "done", "done" if failed else "failed")


def _points(
    past: list[Call], past_futures: list[Future[Sent]], later: list[Call], futures: list[Future[Sent]], tell: Tell
) -> Iterator[Point]:
    """Curve after the fork; gradients that the past left behind belong to its first step."""
    recorded, found, tokens = 0.0, 0.0, 0
    for number, (call, future) in enumerate(zip([*past, *later], [*past_futures, *futures], strict=True)):
        result = _result(future)
        tell("fork", number, len(past) + len(later))
        match call.answer, result:
            case kinds.ForwardBackwardCompleted() as event, wire.ForwardBackwardResult():
                recorded, found, tokens = recorded + event.loss, found + result.loss, tokens + event.num_tokens
            case answer, wire.OptimStepResult():
                was = per_token(recorded, tokens) if isinstance(answer, kinds.OptimStepCompleted) else None
                if number >= len(past):
                    yield Point(step=result.step, recorded=was, replayed=per_token(found, tokens))
                recorded, found, tokens = 0.0, 0.0, 0
            case _:
                recorded, found, tokens = 0.0, 0.0, 0
