"""`fork`: a run's past as it was, its later requests with other settings of the optimizer."""

import asyncio
from collections.abc import Mapping

import msgspec

from tinkerbell.errors import InvalidRequest
from tinkerbell.executors.port import AdapterState
from tinkerbell.replay.curves import Point, curve
from tinkerbell.replay.engine import Replayer
from tinkerbell.replay.findings import Finding
from tinkerbell.replay.history import Call, History, read_history
from tinkerbell.replay.integrity import Tell
from tinkerbell.replay.log import Log
from tinkerbell.replay.session import Change, ExecutorChoice
from tinkerbell.scheduler.environments import Difference
from tinkerbell.types import AdamParams


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """A fork that has run to its end."""

    run: str
    """Whose past it has."""
    seq: int
    """The last request of the past."""
    at_step: int
    changed: dict[str, float]
    points: list[Point]
    """After the fork. Sampled data is the log's: a policy that would have sampled otherwise is not asked."""
    past: list[Point]
    """The same of the shared past, as recorded; executed once, or not at all where a saved state holds it."""
    differences: list[Difference]
    findings: list[Finding]
    """Where the past did not come out as recorded: then nothing was forked."""
    state: AdapterState | None
    """At the end of the fork."""
    num_executed_before: int
    """Requests of the past that were executed: those since its newest saved state."""


def parse_settings(settings: Mapping[str, str]) -> Change:
    """`learning_rate` -> "1e-3" as a change of AdamParams. Raises InvalidRequest for unknown names and bad values."""
    known = [field.name for field in msgspec.structs.fields(AdamParams)]
    for name in settings:
        if name not in known:
            raise InvalidRequest(f"{name!r} cannot be changed; what can: {', '.join(known)}")

    def change(adam: AdamParams) -> AdamParams:
        return msgspec.convert({**msgspec.structs.asdict(adam), **settings}, AdamParams, strict=False)

    try:
        change(AdamParams())
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"{' '.join(f'{name}={value}' for name, value in settings.items())}: {exc}") from exc
    return change


def fork(
    log: Log,
    run: str,
    at: str,
    settings: Mapping[str, str],
    *,
    until: str | None = None,
    choice: ExecutorChoice | None = None,
    tell: Tell = lambda _what, _done, _total: None,
) -> Fork:
    """Bring the run to `at` (`SEQ`, `step:N`), then execute its later requests, up to `until`, with these settings.

    Raises as `verify` does, and InvalidRequest for a `load` on the way, which would end the fork.
    """
    change = parse_settings(settings)
    return asyncio.run(_fork(log, run, at, settings, change, until, choice or ExecutorChoice(), tell))


def forkable(history: History, at: str, until: str | None) -> tuple[Call, int | None]:
    """(last request of the past, position of the last one of the fork or None for all). Raises InvalidRequest where
    a `load` is on the way, which would end the fork."""
    call = history.place(at)
    end = None if until is None else history.place(until).position
    if end is not None and end <= call.position:
        raise InvalidRequest(f"the fork ends at {until}, which is not after {at}")
    for each in history.calls:
        if each.kind == "load" and each.position > call.position and (end is None or each.position <= end):
            seq = each.request.recorded.seq
            assert seq is not None
            raise InvalidRequest(f"the load at seq {seq} would end the fork: stop before it with --until {seq - 1}")
    return call, end


async def _fork(
    log: Log,
    run: str,
    at: str,
    settings: Mapping[str, str],
    change: Change,
    until: str | None,
    choice: ExecutorChoice,
    tell: Tell,
) -> Fork:
    history = read_history(log, run)
    call, end = forkable(history, at, until)
    state = None
    async with Replayer(log, history, choice, tell) as replayer:
        await replayer.begin(call.position, newest=True)
        if not replayer.stopped:
            await replayer.advance(call.position, training_only=True)
        before, num_before, at_step = len(replayer.points), replayer.num_executed, replayer.step
        if not replayer.stopped:
            await replayer.advance(end, change=change, training_only=True)
            state = await replayer.snapshot()
    assert call.request.recorded.seq is not None
    return Fork(
        run=history.run,
        seq=call.request.recorded.seq,
        at_step=at_step,
        changed={name: float(value) for name, value in settings.items()},
        points=replayer.points[before:],
        past=curve(history, call.position),
        differences=replayer.differences,
        findings=replayer.findings,
        state=state,
        num_executed_before=num_before,
    )
