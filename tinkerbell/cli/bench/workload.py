"""What the benchmarks train and sample: tenants with adapters of unequal shape and sequences of unequal length."""

import random
from collections.abc import Sequence

import msgspec
import numpy as np

from tinkerbell.types import AdapterId, Datum, LoraConfig

TARGETS = (("q_proj", "v_proj"), ("all-linear",))
RANKS = (16, 8, 32)
"""Tenants have these in turn."""
TINY_TOKENS = 33
"""No power of two: the shape a GEMM likes least."""
NORMAL_TOKENS = 200
NORMAL_SEQUENCE = (32, 128)
"""Shortest and longest sequence of the normal load."""
LONG_TOKENS = 512
LENGTHS = ("tiny", "normal", "long")


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """One user's adapter and the data of its request."""

    adapter: AdapterId
    lora: LoraConfig
    data: list[Datum]

    @property
    def num_tokens(self) -> int:
        """Of all its sequences."""
        return sum(datum.num_tokens for datum in self.data)


def tenants(length: str, count: int, vocab_size: int) -> list[Tenant]:
    """The first `count` tenants of a load of LENGTHS; the same on every call, and a prefix of those for more."""
    found = []
    for number in range(count):
        noise = random.Random(f"{length} {number}")
        rank = RANKS[number % len(RANKS)]
        lora = LoraConfig(rank=rank, alpha=2.0 * rank, targets=TARGETS[number % len(TARGETS)])
        data = [random_datum(n, vocab_size, noise) for n in _lengths(length, noise)]
        found.append(Tenant(adapter=f"tenant-{number}", lora=lora, data=data))
    return found


def _lengths(length: str, noise: random.Random) -> list[int]:
    if length == "tiny":
        return [TINY_TOKENS]
    if length == "long":
        return [LONG_TOKENS]
    low, high = NORMAL_SEQUENCE
    lengths: list[int] = []
    while (left := NORMAL_TOKENS - sum(lengths)) > 0:
        drawn = round(low * (high / low) ** noise.random())
        lengths.append(left if left - drawn < low else drawn)
    return lengths


def random_datum(num_tokens: int, vocab_size: int, noise: random.Random) -> Datum:
    """Random tokens that predict their successors; the first third has weight 0, as a prompt has."""
    tokens = [noise.randrange(vocab_size) for _ in range(num_tokens + 1)]
    masked = num_tokens // 3
    weights = np.ones(num_tokens, "<f4")
    weights[:masked] = 0
    return Datum(int32(tokens[:-1]), int32(tokens[1:]), {"weights": weights.tobytes()})


def int32(values: Sequence[int]) -> bytes:
    """[N] int32 as the port has them."""
    return np.asarray(values, "<i4").tobytes()
