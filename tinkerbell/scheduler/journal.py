"""What the leader says in the log, with its fence and its name on everything."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from tinkerbell.events.codec import INLINE_BYTES
from tinkerbell.events.kinds import AnyEvent, BatchPlanned, BatchRan, CheckpointWritten, NewEvent
from tinkerbell.events.leases import Lease
from tinkerbell.scheduler import results
from tinkerbell.scheduler.commits import Commits
from tinkerbell.scheduler.pending import PendingRequest, Reason
from tinkerbell.scheduler.residency import Resident
from tinkerbell.scheduler.settlement import Answer
from tinkerbell.types import SYSTEM_TENANT

STREAM = "system/scheduler"

PLAN_DELAY_S = 0.02
"""How long a plan may wait for its batch's results, so that both are one commit. Nothing depends on a plan being
durable before its batch runs: a batch without results never happened."""


class Journal:
    """Makes events of one leadership and hands them to its commits."""

    def __init__(self, commits: Commits, lease: Lease) -> None:
        self._commits = commits
        self._fence = (lease.resource, lease.epoch)
        self._holder = lease.holder
        self._plan: NewEvent | None = None
        self._timer: asyncio.TimerHandle | None = None

    def say(self, event: AnyEvent) -> None:
        """Something of nobody's in particular: lost batches, environments."""
        self._commits.submit(*self._due(), self._system(event))

    def plan(self, event: BatchPlanned) -> None:
        """A batch that is about to run: written with its results, or before them if they take their time."""
        self._flush()
        self._plan = self._system(event)
        self._timer = asyncio.get_running_loop().call_later(PLAN_DELAY_S, self._flush)

    def close(self) -> None:
        """The leadership is over; a plan that was not written never happened."""
        self._due()

    def ran(self, event: BatchRan, answers: Sequence[Answer]) -> asyncio.Task[None] | None:
        """A batch and what it answered, together. With large blobs, or bodies that become blobs, nobody's later results
        wait for it but those of the same adapters, which have to be held back until the returned task is done."""
        written = [*map(self._result, answers), self._system(event)]
        if any(answer.blobs or num_bytes(answer.body) > INLINE_BYTES for answer in answers):
            self._flush()
            return self._commits.submit_apart(*written)
        self._commits.submit(*self._due(), *written)
        return None

    def fail(self, requests: Sequence[PendingRequest], reason: Reason, batch: str | None = None) -> None:
        """Answer requests, in order, that cannot run."""
        if requests:
            events = [results.failed(r, reason.category, reason.code, reason.message, batch) for r in requests]
            self._commits.submit(*self._due(), *map(self._result, map(Answer, requests, events)))

    def checkpoint(
        self, resident: Resident, event: CheckpointWritten, blobs: dict[str, bytes]
    ) -> "asyncio.Task[Exception | None]":
        """A recovery point, and why it was not written. It may not outlive a step that turns out not to be in the
        log."""
        self._flush()
        return self._commits.offer(
            NewEvent(
                event=event,
                tenant=resident.tenant,
                stream=f"adapter/{resident.adapter}",
                adapter=resident.adapter,
                blobs=blobs,
                causation=resident.boundary_position,
                actor=self._holder,
                fence=self._fence,
            )
        )

    @property
    def num_bytes_apart(self) -> int:
        """Bytes of states on their way to the blob store."""
        return self._commits.num_bytes_apart

    async def one_less_apart(self) -> None:
        """Wait until one of them is there."""
        await self._commits.one_less_apart()

    def _due(self) -> list[NewEvent]:
        """The plan that waits, to be written first; it waits no longer."""
        if self._timer is not None:
            self._timer.cancel()
        plan, self._plan, self._timer = self._plan, None, None
        return [plan] if plan is not None else []

    def _flush(self) -> None:
        if due := self._due():
            self._commits.submit(*due)

    def _system(self, event: AnyEvent) -> NewEvent:
        return NewEvent(event=event, tenant=SYSTEM_TENANT, stream=STREAM, actor=self._holder, fence=self._fence)

    def _result(self, answer: Answer) -> NewEvent:
        request = answer.request
        return NewEvent(
            event=answer.event,
            tenant=request.tenant,
            stream=results.stream_of(request),
            adapter=request.adapter,
            body=answer.body,
            blobs=answer.blobs,
            causation=request.position,
            actor=self._holder,
            fence=self._fence,
        )


def num_bytes(value: Any) -> int:
    """Of all byte strings in a body: what it takes before it is compressed, but for a few."""
    match value:
        case bytes():
            return len(value)
        case list() | tuple():
            return sum(map(num_bytes, value))
        case msgspec.Struct():
            return sum(map(num_bytes, msgspec.structs.astuple(value)))
        case _:
            return 0
