"""`verify`: whether a run is what its log says, by executing it again."""

import asyncio
import time
from typing import Literal

import msgspec

from tinkerbell.replay.compare import Deviations
from tinkerbell.replay.curves import Point
from tinkerbell.replay.engine import Replayer
from tinkerbell.replay.findings import Finding
from tinkerbell.replay.history import read_history
from tinkerbell.replay.integrity import Tell, check
from tinkerbell.replay.log import Log
from tinkerbell.replay.session import ExecutorChoice
from tinkerbell.scheduler.environments import Difference, Tolerance


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a verification came to."""

    run: str
    tenant: str
    name: str | None
    log: str
    verdict: Literal["equal", "within tolerance", "diverged"]
    """equal: every bit; within tolerance: environments differ, numbers do not by more than `tolerance`."""
    differences: list[Difference]
    """Of the environments: empty where bits could be compared."""
    tolerance: Tolerance | None
    """None where bits were compared throughout."""
    deviations: Deviations
    findings: list[Finding]
    """The first is where it went wrong; further ones only with keep_going."""
    begun_at_step: int
    num_events: int
    num_executed: int
    """Requests executed again."""
    num_skipped: int
    """Requests that were not: failed on the server's account, or samples."""
    num_compared: int
    """Digests and numbers that were compared."""
    points: list[Point]
    took_s: float


def verify(
    log: Log,
    run: str,
    *,
    choice: ExecutorChoice | None = None,
    since: str | None = None,
    samples: bool = False,
    keep_going: bool = False,
    head: str | None = None,
    rtol: float | None = None,
    tell: Tell = lambda _what, _done, _total: None,
) -> Report:
    """Check a run's hashes, bodies, blobs and plans, then execute it again and compare.

    `since`: begin at the newest saved state at or before this place (`SEQ`, `step:N`) and not at add_lora. Raises
    NotFound, InvalidRequest, Corrupt, MissingPackage, ExecutorDied and what the executor raises where it cannot start:
    then nothing is known about the run.
    """
    return asyncio.run(_verify(log, run, choice or ExecutorChoice(), since, samples, keep_going, head, rtol, tell))


async def _verify(
    log: Log,
    run: str,
    choice: ExecutorChoice,
    since: str | None,
    samples: bool,
    keep_going: bool,
    head: str | None,
    rtol: float | None,
    tell: Tell,
) -> Report:
    started = time.monotonic()
    history = read_history(log, run)
    broken = check(log, history, tell, head=head)
    begun_at_step = 0
    replayer = Replayer(log, history, choice, tell, rtol=rtol, samples=samples, keep_going=keep_going, any_model=True)
    async with replayer:
        if not broken:
            until = None if since is None else history.place(since).position
            await replayer.begin(until, newest=since is not None)
            begun_at_step = replayer.step
            if not replayer.stopped:
                await replayer.advance()
    findings = broken + replayer.findings
    verdict: Literal["equal", "within tolerance", "diverged"] = "equal"
    if findings:
        verdict = "diverged"
    elif replayer.differences:
        verdict = "within tolerance"
    return Report(
        run=history.run,
        tenant=history.tenant,
        name=history.name,
        log=log.name,
        verdict=verdict,
        differences=replayer.differences,
        tolerance=replayer.comparison.tolerance if replayer.differences else None,
        deviations=replayer.comparison.deviations,
        findings=findings,
        begun_at_step=begun_at_step,
        num_events=len(history.entries),
        num_executed=replayer.num_executed,
        num_skipped=replayer.num_skipped,
        num_compared=replayer.comparison.num_compared,
        points=replayer.points,
        took_s=time.monotonic() - started,
    )
