"""Losses of a run by optimizer step."""

import math

import msgspec

from tinkerbell.events import kinds
from tinkerbell.replay.history import History


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer step, as it was and as it came out now."""

    step: int
    recorded: float | None
    """Loss per token of the requests whose gradient it applied; None where nothing was recorded."""
    replayed: float | None
    """None where it was not executed."""


def per_token(loss: float, num_tokens: int) -> float:
    """nan where there is no token."""
    return loss / num_tokens if num_tokens else math.nan


def curve(history: History, until: int | None = None) -> list[Point]:
    """The recorded losses, up to the request at position `until`."""
    points: list[Point] = []
    loss, tokens = 0.0, 0
    for call in history.calls:
        if until is not None and call.position > until:
            break
        match call.answer:
            case kinds.ForwardBackwardCompleted() as event:
                loss, tokens = loss + event.loss, tokens + event.num_tokens
            case kinds.OptimStepCompleted(step=step):
                points.append(Point(step=step, recorded=per_token(loss, tokens), replayed=None))
                loss, tokens = 0.0, 0
            case kinds.LoadCompleted():
                loss, tokens = 0.0, 0
    return points
