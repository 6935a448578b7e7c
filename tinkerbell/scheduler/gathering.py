"""Whether to wait a moment before the next batch, for adapters that were just served and are likely back at once.

Clients that are answered together come back within milliseconds of one another. Without waiting, the first of them runs
alone and the rest in a second pass, for ever so. Pure: the clock is the caller's.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tinkerbell.types import AdapterId

SHARE = 0.02
"""Of what the last batch took: the longest wait. A pass for one adapter apart costs several times as much."""
LEAST_S = 0.001
"""Shorter waits are not worth a timer."""
MOST_S = 0.25


@dataclass(slots=True)
class _Habit:
    """How a client of this adapter comes back."""

    sent: int = 0
    """Requests since it had none."""
    burst: int = 0
    """As many it sent the last time until all were answered."""
    prompt: bool = True
    """Whether they came while they could be waited for."""


class Gathering:
    """Learns from each batch who comes back promptly, and with how many requests."""

    def __init__(self) -> None:
        self._habits: dict[AdapterId, _Habit] = {}
        self._away: set[AdapterId] = set()
        """Served by the last batch, and not back with all that is expected."""
        self._window_s = 0.0
        self._begun: float | None = None
        """When there was something to do after the last batch."""

    def served(self, idle: Iterable[AdapterId], busy_s: float, now: float, *, more: bool) -> None:
        """A batch ended; `idle`: adapters in it that now have no requests; `more`: whether any others have."""
        self._window_s = min(SHARE * busy_s, MOST_S)
        self._begun = now if more else None
        self._away = set(idle)
        for adapter in self._away:
            habit = self._habits.setdefault(adapter, _Habit())
            habit.burst, habit.sent = habit.sent, 0

    def sent(self, adapter: AdapterId, now: float) -> None:
        """A request of the adapter was taken in."""
        if self._begun is None:
            self._begun = now
        habit = self._habits.setdefault(adapter, _Habit())
        habit.sent += 1
        if adapter in self._away and habit.sent >= habit.burst:
            self._away.remove(adapter)
            habit.prompt = now - self._begun <= self._window_s

    def wait_s(self, now: float) -> float:
        """How long the next batch should wait at most for who is away; 0: not at all. Something must be pending."""
        if self._begun is None:
            self._begun = now
        left_s = self._begun + self._window_s - now
        awaited = [habit for habit in map(self._habits.__getitem__, self._away) if habit.prompt]
        if awaited and left_s >= LEAST_S:
            return left_s
        for habit in awaited:
            habit.prompt = False
        return 0.0

    def forget(self, adapter: AdapterId) -> None:
        """It will not come back."""
        self._habits.pop(adapter, None)
        self._away.discard(adapter)
