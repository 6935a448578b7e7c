"""CPU seconds, wall seconds and peak memory of variants that take turns, so that a slow spell hits them all."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from tinkerbell.cli.bench.memory import peak_bytes

TURN_S = 10.0
"""A turn begins no further call after so long."""


@dataclass(slots=True)
class Cost:
    """Of one call: the least time of its repetitions, the most memory."""

    cpu_s: float = float("inf")
    """Of all threads of this process."""
    wall_s: float = float("inf")
    peak_bytes: int | None = None
    """Over what was resident before; None where the system cannot say or nobody asked."""

    def add(self, call: Callable[[], object]) -> None:
        """Time one more call."""
        cpu, wall = time.process_time(), time.perf_counter()
        call()
        self.cpu_s = min(self.cpu_s, time.process_time() - cpu)
        self.wall_s = min(self.wall_s, time.perf_counter() - wall)


def compare(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    calls: int = 1,
    fresh: Callable[[], object] | None = None,
    each_turn: Callable[[str], object] = lambda name: None,
) -> dict[str, Cost]:
    """The cost of each. With `fresh` the first turn also measures the peak memory of each variant, from where `fresh`
    leaves the process.

    A turn is up to `calls` calls in a row: a variant finds caches and memory as another left them, and only from its
    second call on as it leaves them itself, as in a loop that does nothing else.
    """
    costs = {name: Cost() for name in variants}
    for turn in range(repeats):
        for name, call in variants.items():
            cost = costs[name]
            began = time.perf_counter()
            if turn == 0 and fresh is not None:
                fresh()
                cost.peak_bytes = peak_bytes(partial(cost.add, call))
            else:
                cost.add(call)
            for _ in range(calls - 1):
                if time.perf_counter() - began < TURN_S:
                    cost.add(call)
            each_turn(name)
    return costs
