"""What is known of one user while it trains: written by its thread, read by the display."""

import threading
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from tinkerbell import wire
from tinkerbell.sdk import Future

Measure = Literal["loss", "reward"]


@dataclass(frozen=True, slots=True)
class Point:
    """One optimizer step as its user sees it."""

    at_s: float
    """Since the users started."""
    value: float
    """Loss per learned token in nats, or mean reward."""


@dataclass(slots=True)
class Track:
    """One user's run so far."""

    user: str
    task: str
    lora: str
    measure: Measure
    num_steps: int
    points: list[Point] = field(default_factory=list)
    tokens: int = 0
    """Trained on and sampled."""
    cost_us: int = 0
    """Accelerator microseconds billed so far."""
    before: list[tuple[str, str]] = field(default_factory=list)
    """(prompt, continuation) of the untrained adapter."""
    after: list[tuple[str, str]] = field(default_factory=list)
    state: Literal["waiting", "training", "done", "failed"] = "waiting"
    error: str = ""
    started_at: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self, value: float) -> None:
        """An optimizer step was taken."""
        self.points.append(Point(time.monotonic() - self.started_at, value))

    def billed(self, *futures: Future[Any]) -> None:
        """Count what answered requests cost and carried."""
        with self._lock:
            for future in futures:
                self.cost_us += future.state.cost_us or 0
                self.tokens += _tokens_of(future.state.result)


def _tokens_of(result: wire.ResultBody | None) -> int:
    if isinstance(result, wire.ForwardBackwardResult):
        return result.num_tokens
    if isinstance(result, wire.SampleResult):
        return sum(len(sequence.tokens) for sequence in result.sequences)
    return 0
