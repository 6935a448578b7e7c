"""How long each unit of a batch had the executor to itself; what several units shared is in none of the times."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tinkerbell.executors.port import Unit


class Meter:
    """Of one batch. Times of different units must not overlap: they are parts of the batch's."""

    def __init__(self) -> None:
        self._ns: dict[int, float] = {}
        """By the identity of the unit, which lives as long as the batch."""

    @contextmanager
    def of(self, unit: Unit) -> Iterator[None]:
        """What is done within is done for this unit alone."""
        started = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(unit, time.perf_counter_ns() - started)

    @contextmanager
    def divided(self, shares: Sequence[tuple[Unit, float]]) -> Iterator[None]:
        """What is done within is done for these units, in these proportions (one of them > 0)."""
        started = time.perf_counter_ns()
        try:
            yield
        finally:
            took, total = time.perf_counter_ns() - started, sum(share for _, share in shares)
            for unit, share in shares:
                self.add(unit, took * share / total)

    def add(self, unit: Unit, ns: float) -> None:
        """So many nanoseconds went to this unit."""
        self._ns[id(unit)] = self._ns.get(id(unit), 0.0) + ns

    def own_us(self, units: Sequence[Unit]) -> list[int]:
        """Microseconds of each, for BatchResult."""
        return [int(self._ns.get(id(unit), 0.0) / 1000) for unit in units]
