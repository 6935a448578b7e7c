"""`diff`: where two runs part, which settings they do not share, and their losses side by side."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import msgspec

from tinkerbell.events import kinds
from tinkerbell.events.kinds import Body, ForwardBackwardBody
from tinkerbell.replay.curves import curve
from tinkerbell.replay.history import Call, History, read_history
from tinkerbell.replay.log import Log, body_of
from tinkerbell.scheduler.environments import Difference, differences


class Parting(msgspec.Struct, frozen=True, kw_only=True):
    """The first thing that is not the same."""

    seq: int
    kind: str
    """Of the request in A, and in B where that differs; `none` after the end."""
    field: str
    """What of it: `adam.learning_rate`, `data[3].tokens`."""
    a: str
    b: str


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """A hyper-parameter with the values each run used, in the order of their first use."""

    name: str
    a: list[str]
    b: list[str]


class PairPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Losses per token of the same step; None where a run has no such step."""

    step: int
    a: float | None
    b: float | None


class Diff(msgspec.Struct, frozen=True, kw_only=True):
    """Two runs against each other."""

    a: str
    b: str
    first_request: Parting | None
    """None: the same was asked of both, as far as both go."""
    first_state: int | None
    """The first step after which the weights or moments differ; None: never."""
    settings: list[Setting]
    environments: list[Difference]
    """Of the first environments of each; `recorded` is A's, `found` is B's."""
    points: list[PairPoint]


def diff(log_a: Log, run_a: str, log_b: Log, run_b: str) -> Diff:
    """Align two runs by seq. Samples have none and are left out. Raises NotFound, InvalidRequest, Corrupt."""
    a, b = read_history(log_a, run_a), read_history(log_b, run_b)
    steps_a, steps_b = _states(a), _states(b)
    curve_a, curve_b = _curve(a), _curve(b)
    return Diff(
        a=a.run,
        b=b.run,
        first_request=next(_partings(log_a, a, log_b, b), None),
        first_state=next((n for n in sorted(steps_a.keys() & steps_b.keys()) if steps_a[n] != steps_b[n]), None),
        settings=list(_settings(a, b)),
        environments=_environments(a, b),
        points=[
            PairPoint(step=step, a=curve_a.get(step), b=curve_b.get(step))
            for step in sorted(curve_a.keys() | curve_b.keys())
        ],
    )


def _sequenced(history: History) -> list[Call]:
    return [call for call in history.calls if call.request.recorded.seq is not None]


def _partings(log_a: Log, a: History, log_b: Log, b: History) -> Iterator[Parting]:
    for seq, (one, other) in enumerate(zip_longest(_sequenced(a), _sequenced(b))):
        if one is None or other is None:
            longer = one or other
            assert longer is not None
            kind = longer.kind
            yield Parting(seq=seq, kind=kind, field="kind", a=kind if one else "none", b=kind if other else "none")
            return
        if one.kind != other.kind:
            yield Parting(seq=seq, kind=f"{one.kind} / {other.kind}", field="kind", a=one.kind, b=other.kind)
            return
        facts_a, facts_b = _flat(one.asked), _flat(other.asked)
        for name in sorted(facts_a.keys() | facts_b.keys()):
            if facts_a.get(name) != facts_b.get(name):
                yield Parting(seq=seq, kind=one.kind, field=name, a=str(facts_a.get(name)), b=str(facts_b.get(name)))
        # Equal stored bytes are equal bodies; a compressor of another release may give others for the same.
        if one.request.recorded.body_hash != other.request.recorded.body_hash:
            for name, in_a, in_b in _bodies(body_of(log_a, one.request), body_of(log_b, other.request)):
                yield Parting(seq=seq, kind=one.kind, field=name, a=in_a, b=in_b)


NAMES = ("type", "name", "checkpoint", "num_datums", "num_tokens")
"""Facts of a request that say nothing about how it is trained: what a run or checkpoint is called, and what follows
from the data."""


def _flat(event: Any) -> dict[str, Any]:
    """A request's facts by dotted name."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else name, inner)
        else:
            found[prefix] = value

    walk("", {name: value for name, value in msgspec.to_builtins(event).items() if name not in NAMES})
    return found


def _bodies(a: Body | None, b: Body | None) -> Iterator[tuple[str, str, str]]:
    """(place, in A, in B) of what differs in the data."""
    assert isinstance(a, ForwardBackwardBody) and isinstance(b, ForwardBackwardBody)
    for index, (one, other) in enumerate(zip_longest(a.data, b.data)):
        if one is None or other is None:
            yield "data", f"{len(a.data)} datums", f"{len(b.data)} datums"
            return
        arrays = {"tokens": (one.tokens, other.tokens, "i"), "targets": (one.targets, other.targets, "i")}
        for name in sorted(one.loss_inputs.keys() | other.loss_inputs.keys()):
            arrays[f"loss_inputs.{name}"] = (one.loss_inputs.get(name, b""), other.loss_inputs.get(name, b""), "f")
        for name, (before, now, letter) in arrays.items():
            if before == now:
                continue
            values_a, values_b = memoryview(before).cast(letter), memoryview(now).cast(letter)  # type: ignore[call-overload]
            place = next(
                (n for n, (x, y) in enumerate(zip(values_a, values_b, strict=False)) if x != y),
                min(len(values_a), len(values_b)),
            )
            in_a = str(values_a[place]) if place < len(values_a) else f"{len(values_a)} values"
            in_b = str(values_b[place]) if place < len(values_b) else f"{len(values_b)} values"
            yield f"data[{index}].{name}[{place}]", in_a, in_b


def _settings(a: History, b: History) -> Iterator[Setting]:
    used_a, used_b = _used(a), _used(b)
    for name in dict.fromkeys([*used_a, *used_b]):
        values_a, values_b = list(used_a.get(name, {})), list(used_b.get(name, {}))
        if values_a != values_b:
            yield Setting(name=name, a=values_a, b=values_b)


def _used(history: History) -> dict[str, dict[str, None]]:
    """Name -> its values in the order of their first use."""
    used: dict[str, dict[str, None]] = {}
    for call in _sequenced(history):
        if isinstance(call.asked, kinds.AddLoraRequested | kinds.OptimStepRequested | kinds.ForwardBackwardRequested):
            for name, value in _flat(call.asked).items():
                used.setdefault(name, {})[str(value)] = None
    return used


def _states(history: History) -> dict[int, str]:
    """Step -> digest; of a step that was taken twice, after a load, the last."""
    answers = [call.answer for call in history.calls]
    return {each.step: each.state_digest for each in answers if isinstance(each, kinds.OptimStepCompleted)}


def _curve(history: History) -> dict[int, float | None]:
    return {point.step: point.recorded for point in curve(history)}


def _environments(a: History, b: History) -> list[Difference]:
    first_a = next((c.environment for c in a.calls if c.environment is not None), None)
    first_b = next((c.environment for c in b.calls if c.environment is not None), None)
    if first_a is None or first_b is None:
        return []
    return differences(a.environment(first_a), b.environment(first_b))
