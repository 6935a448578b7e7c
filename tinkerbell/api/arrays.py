"""Arrays of bodies as JSON lists. Pure."""

import math
from typing import Any

import numpy as np

from tinkerbell.errors import Corrupt

Table = np.ndarray[tuple[int, int], np.dtype[Any]]
"""[rows, width]"""


class NotFinite(Exception):
    """A number of a result is NaN or infinite."""


def floats(raw: bytes) -> list[float]:
    """[N] float32 as JSON numbers that read back as the same float32. Raises NotFinite."""
    array = np.frombuffer(raw, "<f4")
    if not np.isfinite(array).all():
        raise NotFinite
    numbers: list[float] = array.tolist()
    return numbers


def table(position: int, raw: bytes | None, dtype: str, n: int, width: int = -1, *, gaps: bool = False) -> Table | None:
    """[n, width] of an array of the event at `position`; -1: whatever width it has. `gaps`: NaN says that there is no
    number. Raises Corrupt for another size, NotFinite."""
    if raw is None:
        return None
    array = np.frombuffer(raw, dtype)
    if width < 0:
        width = array.size // n if n else 0
    if array.size != n * width or (n and not width):
        raise Corrupt(f"event {position} has {array.size} numbers of an output for {n} tokens")
    if not (np.isfinite(array) | (np.isnan(array) if gaps else False)).all():
        raise NotFinite
    return array.reshape(n, width)


def likeliest(
    position: int, tokens: bytes | None, logprobs: bytes | None, n: int
) -> tuple[list[list[int]] | None, list[list[float]] | None]:
    """([n, k] tokens, [n, k] logprobs), None where they were not asked for. Raises Corrupt unless they are alike."""
    ids, nats = table(position, tokens, "<i4", n), table(position, logprobs, "<f4", n)
    widths = [0 if top is None else top.shape[1] for top in (ids, nats)]
    if widths[0] != widths[1]:
        raise Corrupt(f"event {position} has of each token the likeliest {widths[0]} tokens and {widths[1]} logprobs")
    return None if ids is None else ids.tolist(), None if nats is None else nats.tolist()


def with_gaps(position: int, raw: bytes | None, n: int) -> list[list[float | None]] | None:
    """[n, width] float32, null for NaN. Raises Corrupt, NotFinite."""
    found = table(position, raw, "<f4", n, gaps=True)
    if found is None:
        return None
    return [[None if math.isnan(number) else number for number in row] for row in found.tolist()]
