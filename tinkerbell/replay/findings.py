"""What a replay can find."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from tinkerbell.replay.history import Call

What = Literal[
    "chain",
    "body",
    "plan",
    "checkpoint",
    "outcome",
    "loss",
    "metrics",
    "logprobs",
    "outputs",
    "gradient",
    "grad_norm",
    "weights",
    "state",
    "sample",
]
"""chain: an event is not what its hash says; body: bytes of a body or blob; plan: batch.planned against the
request's own cut; outcome: done where it failed or the other way round; the others: the digest or number of that
name."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something is not what the log says."""

    what: What
    position: int
    """Of the event that says it."""
    seq: int | None = None
    """Of the request."""
    kind: str | None = None
    """Of the request."""
    step: int | None = None
    """Optimizer steps behind the adapter when the request ran, its own included."""
    recorded: str | float | None = None
    found: str | float | None = None

    @property
    def text(self) -> str:
        """One line for a person."""
        where = f"event {self.position}"
        if self.kind is not None:
            where = f"{self.kind} at seq {self.seq} ({where})" if self.seq is not None else f"{self.kind} ({where})"
        if self.step is not None:
            where += f", step {self.step}"
        return f"{self.what} of {where}: recorded {short(self.recorded)}, found {short(self.found)}"


def short(value: object) -> str:
    """A value in a line: digests are cut, numbers are not."""
    text = repr(value) if isinstance(value, float) else str(value)
    is_digest = len(text) == 64 and all(char in "0123456789abcdef" for char in text)
    return f"{text[:16]}…" if is_digest else text


def finding(what: What, call: Call, recorded: Any, found: Any, *, step: int | None = None) -> Finding:
    """About a request's result."""
    assert call.result is not None
    return Finding(
        what=what,
        position=call.result.position,
        seq=call.request.recorded.seq,
        kind=call.kind,
        step=step,
        recorded=recorded,
        found=found,
    )


def mean_difference(recorded: Sequence[bytes], found: Sequence[bytes]) -> float:
    """Mean |difference| of logprobs [N] float32 of datums, nats; inf where the shapes differ."""
    total, count = 0.0, 0
    if [len(values) for values in recorded] != [len(values) for values in found]:
        return math.inf
    for before, now in zip(recorded, found, strict=True):
        pairs = list(zip(_floats(before), _floats(now), strict=True))
        total += math.fsum(abs(a - b) for a, b in pairs)
        count += len(pairs)
    return total / count if count else 0.0


def _floats(data: bytes) -> Iterator[float]:
    return iter(memoryview(data).cast("f"))
