"""What a replay can find, and how two environments and two numbers compare."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from tinkerbell.events.kinds import EnvironmentRecorded
from tinkerbell.executors.port import Environment
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


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A fact of the environment that is not the same here."""

    fact: str
    recorded: str | None
    found: str | None


def differences(recorded: EnvironmentRecorded, found: EnvironmentRecorded | Environment) -> list[Difference]:
    """Facts that decide bits and differ. Where the model lies on a machine does not: `weights_hash` names it."""
    before, now = _facts(recorded), _facts(found)
    return [
        Difference(fact=name, recorded=before.get(name), found=now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _facts(environment: EnvironmentRecorded | Environment) -> dict[str, str]:
    of_model = {"vocab_size": str(environment.model.vocab_size), "exact": str(environment.exact).lower()}
    return {"executor": environment.executor, **of_model, **environment.facts}


class Tolerance(msgspec.Struct, frozen=True, kw_only=True):
    """How far numbers may be apart where the environments differ. Rounding grows with every step that is taken."""

    rtol: float
    """Of a loss, relative, per step taken; of logprobs the same, in nats, as the mean over a request."""
    norm_rtol: float
    """Of a gradient's norm, relative, per step taken."""

    def loss(self, step: int) -> float:
        return self.rtol * (1 + step)

    def norm(self, step: int) -> float:
        return self.norm_rtol * (1 + step)


def tolerance_of(dtype: str | None, rtol: float | None = None) -> Tolerance:
    """The bounds for a base model's dtype, or `rtol` for all of them.

    fp32: 1e-4 per step, a thousand times what another split or thread count did to the losses of three steps of a 135M
    model; bf16 and fp16 have 8 and 11 bits: 2e-2; fp64: 1e-9. Norms get ten times as much.
    """
    if rtol is None:
        rtol = {"float64": 1e-9, "bfloat16": 2e-2, "float16": 2e-2}.get(dtype or "", 1e-4)
    return Tolerance(rtol=rtol, norm_rtol=10 * rtol)


def relative(recorded: float, found: float) -> float:
    """|difference| by the larger magnitude; 0 for equal numbers."""
    if recorded == found:
        return 0.0
    return abs(recorded - found) / max(abs(recorded), abs(found))


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
