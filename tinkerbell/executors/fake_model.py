"""A toy language model in plain Python: next-token distributions over hashed features, with exact gradients.

Shapes: V vocabulary, K features of an adapter, T tokens.

The logit of token v after token c is base[c, v] + (alpha / rank) A[k] B[k] with k = feature(c, v), where base and
feature are hashes. With B = 0 an adapter is the base model, as with LoRA, and A's gradient is zero.
"""

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from functools import cached_property

import msgspec

from tinkerbell.executors.randomness import PROMPT, uniform
from tinkerbell.types import DatumOutputs, OutputSpec, PromptScores, SamplingParams

BASE_SPREAD = 2.0
"""Logits of the base model are uniform in ±BASE_SPREAD."""


class Row:
    """The distribution after one token."""

    def __init__(self, logits: list[float]) -> None:
        highest = max(logits)
        total = sum(math.exp(z - highest) for z in logits)
        log_total = highest + math.log(total)
        self.logits = logits
        self.logsumexp = log_total
        self.logprobs = [z - log_total for z in logits]

    @cached_property
    def probabilities(self) -> list[float]:
        """[V]"""
        return [math.exp(logprob) for logprob in self.logprobs]

    @cached_property
    def entropy(self) -> float:
        """Nats."""
        return -math.fsum(p * logprob for p, logprob in zip(self.probabilities, self.logprobs, strict=True))

    @cached_property
    def order(self) -> list[int]:
        """[V] tokens, likeliest first, of equal ones the lower id."""
        return sorted(range(len(self.logits)), key=lambda v: (-self.logits[v], v))


class BaseModel:
    """The frozen part: a table of logits and features, made row by row when it is first needed.

    `rounding_ppm`: millionths by which all logits are larger, as if another machine rounded.
    """

    def __init__(self, vocab_size: int, rounding_ppm: int = 0) -> None:
        self.vocab_size = vocab_size
        self._spread = BASE_SPREAD * (1 + rounding_ppm / 1e6)
        self._logits: dict[int, list[float]] = {}
        self._hashes: dict[int, tuple[int, ...]] = {}

    def logits(self, token: int) -> list[float]:
        """[V] of what follows `token`."""
        row = self._logits.get(token)
        if row is None:
            step = 2 * self._spread / 0xFFFFFFFF
            row = self._logits[token] = [step * h - self._spread for h in self._hash("logit", token)]
        return row

    def features(self, token: int, num_features: int) -> list[int]:
        """[V] feature of each token after `token`, below `num_features`."""
        hashes = self._hashes.get(token)
        if hashes is None:
            hashes = self._hashes[token] = self._hash("feature", token)
        return [h % num_features for h in hashes]

    def _hash(self, purpose: str, token: int) -> tuple[int, ...]:
        data = hashlib.shake_128(f"{purpose}:{token}".encode()).digest(4 * self.vocab_size)
        return struct.unpack(f"<{self.vocab_size}I", data)


class Distribution:
    """The base model with one state of an adapter: `deltas` [K] are added to the features' logits."""

    def __init__(self, base: BaseModel, deltas: Sequence[float] | None) -> None:
        self._base = base
        self._deltas = deltas
        self._rows: dict[int, Row] = {}

    def row(self, token: int) -> Row:
        """What follows `token`."""
        row = self._rows.get(token)
        if row is None:
            logits = self._base.logits(token)
            if self._deltas is not None:
                deltas = self._deltas
                features = self._base.features(token, len(deltas))
                logits = [z + deltas[k] for z, k in zip(logits, features, strict=True)]
            row = self._rows[token] = Row(logits)
        return row

    def target_logprobs(self, tokens: Sequence[int], targets: Sequence[int]) -> list[float]:
        """[T] nats of each target after its token."""
        return [self.row(token).logprobs[target] for token, target in zip(tokens, targets, strict=True)]

    def outputs(self, tokens: Sequence[int], spec: OutputSpec) -> DatumOutputs:
        """What `spec` asks for of the distributions after each token."""
        rows = [self.row(token) for token in tokens]
        top = [(row, v) for row in rows for v in row.order[: spec.top_k]]
        return DatumOutputs(
            entropy=_floats(row.entropy for row in rows) if spec.entropy else None,
            logsumexp=_floats(row.logsumexp for row in rows) if spec.logsumexp else None,
            top_tokens=struct.pack(f"<{len(top)}i", *(v for _, v in top)) if spec.top_k else None,
            top_logprobs=_floats(row.logprobs[v] for row, v in top) if spec.top_k else None,
            logits=_floats(z for row in rows for z in row.logits) if spec.logits else None,
        )

    def prompt_scores(
        self, prompt: Sequence[int], params: SamplingParams, seed: int, draws: range, targets: Sequence[int] | None
    ) -> PromptScores | None:
        """What is asked for of a prompt of P tokens; targets [P * K], row after row, -1 being none."""
        top_k, num_draws = params.prompt_top_logprobs, len(draws)
        if not top_k and not num_draws and targets is None:
            return None
        top = self.outputs(prompt[:-1], OutputSpec(top_k=top_k))
        found: bytes | None = None
        if targets is not None:
            width = len(targets) // len(prompt)
            # Nothing is known of the first token: there is none before it.
            logprobs = [math.nan] * width
            for i, target in enumerate(targets[width:]):
                logprobs.append(self.row(prompt[i // width]).logprobs[target] if target >= 0 else math.nan)
            found = _floats(logprobs)
        uncut = msgspec.structs.replace(params, top_k=-1, top_p=1.0)
        drawn = [
            (row, _choose(row, uncut, uniform(seed, draw, n, PROMPT)))
            for n, row in enumerate(map(self.row, prompt[:-1]))
            for draw in draws
        ]
        return PromptScores(
            top_tokens=top.top_tokens,
            top_logprobs=top.top_logprobs,
            target_logprobs=found,
            drawn_tokens=struct.pack(f"<{len(drawn)}i", *(v for _, v in drawn)) if num_draws else None,
            drawn_logprobs=_floats(row.logprobs[v] for row, v in drawn) if num_draws else None,
        )

    def gradient(self, tokens: Sequence[int], targets: Sequence[int], slopes: Sequence[float]) -> list[float]:
        """[K] dLoss/ddelta, given slopes [T] = dLoss/dlogprob.

        dlogp(y|c)/dlogit(v|c) = [v = y] - p(v|c); tokens with the same c share their row of p.
        """
        assert self._deltas is not None, "the base model has no gradient"
        by_token: dict[int, dict[int, float]] = {}
        for token, target, slope in zip(tokens, targets, slopes, strict=True):
            per_target = by_token.setdefault(token, {})
            per_target[target] = per_target.get(target, 0.0) + slope
        gradient = [0.0] * len(self._deltas)
        for token, per_target in by_token.items():
            features = self._base.features(token, len(gradient))
            total = sum(per_target.values())
            for k, probability in zip(features, self.row(token).probabilities, strict=True):
                gradient[k] -= total * probability
            for target, slope in per_target.items():
                gradient[features[target]] += slope
        return gradient

    def sample(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int,
        sample: int,
        max_tokens: int,
        stop_tokens: set[int],
    ) -> tuple[list[int], list[float], bool]:
        """Tokens and logprobs of one continuation, and whether a stop ended it.

        Tokens below 256 are bytes of text, for `params.stop`.
        """
        stops = [text.encode() for text in params.stop]
        tokens: list[int] = []
        logprobs: list[float] = []
        text = b""
        last = prompt[-1]
        for token in range(max_tokens):
            row = self.row(last)
            last = _choose(row, params, uniform(seed, sample, token))
            tokens.append(last)
            logprobs.append(row.logprobs[last])
            text += bytes([last]) if last < 256 else b""
            if last in stop_tokens or any(stop in text for stop in stops):
                return tokens, logprobs, True
        return tokens, logprobs, False


def _choose(row: Row, params: SamplingParams, u: float) -> int:
    """Inverse of the cumulative distribution after temperature, top_k and top_p, likeliest tokens first."""
    order = sorted(range(len(row.logprobs)), key=lambda v: (-row.logprobs[v], v))
    if params.temperature == 0:
        return order[0]
    if params.top_k > 0:
        order = order[: params.top_k]
    highest = row.logprobs[order[0]]
    weights = [math.exp((row.logprobs[v] - highest) / params.temperature) for v in order]
    total = sum(weights)
    kept, reached = len(order), 0.0
    for i, weight in enumerate(weights):
        reached += weight
        if reached >= params.top_p * total:
            kept = i + 1
            break
    threshold = u * sum(weights[:kept])
    reached = 0.0
    for v, weight in zip(order[:kept], weights, strict=False):
        reached += weight
        if reached > threshold:
            return v
    return order[kept - 1]


def _floats(numbers: Iterable[float]) -> bytes:
    """As little-endian float32."""
    found = list(numbers)
    return struct.pack(f"<{len(found)}f", *found)
