"""How tests wait: for something that can be looked at, as long as only a hang would take."""

import time
from collections.abc import Callable

PATIENCE_S = 120.0
"""A hundred times what anything here takes on an idle machine, so that a slow and busy one gets there too."""

AT_ONCE_S = 30.0
"""For what must not be held up, where what would hold it up takes at least twice as long."""


def eventually(condition: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    """Wait until the condition holds; fail if it does not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        time.sleep(0.005)
