"""What a forward answers of each token's distribution besides the logprob of its target.

Shapes: as in `head`: N rows of one micro-batch, C rows of one chunk, V vocabulary, B columns of one block, k likeliest,
K targets of each row besides its own.

All of it comes from the blocks of logits that the logprobs are computed from, in the same sweep. Entropy is joined
block by block beside the softmax: with e = exp(z - top), H = log sum(e) - sum(e (z - top)) / sum(e), which is
logsumexp - sum(p z) without the difference of two large numbers. What works on rows of several micro-batches is exact,
or a kernel that begins anew with every row, so that a row has the same bits in any company.
"""

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tinkerbell.executors.hf.head import Softmax
from tinkerbell.executors.hf.prompt_draws import Draws
from tinkerbell.types import DatumOutputs, OutputSpec


class Rows:
    """Outputs of rows [start, stop) of a pass, which want the same."""

    def __init__(
        self, start: int, stop: int, spec: OutputSpec, vocab_size: int, like: Tensor, targets: Tensor | None = None,
        draws: Draws | None = None,
    ) -> None:  # fmt: skip
        """Makes room for what is wanted, in the dtype and on the device of `like`. targets [N, K] int64: -1 is none;
        `draws` of these rows."""
        self.start, self.stop, self.spec = start, stop, spec
        n, k = stop - start, spec.top_k
        self.entropy = like.new_empty(n) if spec.entropy else None
        """[N]"""
        self.logsumexp = like.new_empty(n) if spec.logsumexp else None
        """[N]"""
        self.top_tokens = like.new_empty(n, k, dtype=torch.int64) if k else None
        """[N, k]"""
        self.top_logprobs = like.new_empty(n, k) if k else None
        """[N, k]"""
        self.logits = like.new_empty(n, vocab_size) if spec.logits else None
        """[N, V]"""
        self.draws = draws
        self.targets = targets
        self.target_logprobs = None if targets is None else like.new_full(targets.shape, torch.nan)
        """[N, K], NaN where there is no target."""
        self.took_ns = 0.0
        """That what is wanted took, besides the logprobs."""

    def finite(self) -> bool:
        """Whether all numbers are that were asked for."""
        drawn = None if self.draws is None else self.draws.logprobs
        found = [self.entropy, self.logsumexp, self.top_logprobs, self.logits, drawn]
        if self.targets is not None and self.target_logprobs is not None:
            found.append(self.target_logprobs[self.targets >= 0])
        return all(bool(torch.isfinite(part).all()) for part in found if part is not None)

    def split(self, lengths: Sequence[int]) -> list[DatumOutputs]:
        """The outputs of data of these lengths, which follow one another in these rows."""
        floats = [
            _bytes(part, torch.float32, lengths)
            for part in (self.entropy, self.logsumexp, self.top_logprobs, self.logits)
        ]
        entropy, logsumexp, top_logprobs, logits = floats
        top_tokens = _bytes(self.top_tokens, torch.int32, lengths)
        return [
            DatumOutputs(*parts)
            for parts in zip(entropy, logsumexp, top_tokens, top_logprobs, logits, strict=True)
        ]  # fmt: skip


def _bytes(rows: Tensor | None, dtype: torch.dtype, lengths: Sequence[int]) -> Iterable[bytes | None]:
    if rows is None:
        return [None] * len(lengths)
    return [part.numpy().tobytes() for part in torch.split(rows.to(dtype).cpu(), list(lengths))]


class Sweep:
    """One sweep over the vocabulary for a chunk of rows [start, stop) of a pass, C >= stop - start."""

    def __init__(self, wanted: Sequence[Rows], start: int, stop: int) -> None:
        self._start = start
        self._wanted = [rows for rows in wanted if rows.start < stop and rows.stop > start]
        self._stop = stop
        self._with_entropy = any(rows.spec.entropy for rows in self._wanted)
        self._k = max((rows.spec.top_k for rows in self._wanted), default=0)
        self._moment: Tensor | None = None
        """[C] sum of exp(z - top) (z - top)."""
        self._top: tuple[Tensor, Tensor] | None = None
        """[C, k] largest logits so far, and their columns."""

    def _charge(self, took_ns: float, wanting: Sequence[Rows]) -> None:
        """Divide what was computed for the whole chunk over those who wanted it."""
        parts = [min(rows.stop, self._stop) - max(rows.start, self._start) for rows in wanting]
        for rows, part in zip(wanting, parts, strict=True):
            rows.took_ns += took_ns * part / sum(parts)

    def take(self, softmax: Softmax, first: int, end: int, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What Softmax.take does and returns, z [C, B] being logits of columns [first, end)."""
        for rows in self._wanted:
            started = time.perf_counter_ns()
            if rows.logits is not None:
                ours, chunk = self._overlap(rows)
                rows.logits[ours, first:end] = z[chunk]
            if rows.targets is not None and rows.target_logprobs is not None:
                ours, chunk = self._overlap(rows)
                column = rows.targets[ours] - first
                inside = (column >= 0) & (column < end - first)
                found = z[chunk].gather(1, column.clamp_(0, end - first - 1))
                rows.target_logprobs[ours] = torch.where(inside, found, rows.target_logprobs[ours])
            if rows.draws is not None:
                ours, chunk = self._overlap(rows)
                rows.draws.take(ours, first, z[chunk])
            rows.took_ns += time.perf_counter_ns() - started
        if self._k:
            started = time.perf_counter_ns()
            self._top = _join(self._top, largest(z, min(self._k, end - first)), first, self._k)
            self._charge(time.perf_counter_ns() - started, [rows for rows in self._wanted if rows.spec.top_k])
        if not self._with_entropy:
            return softmax.take(first, end, z)
        started = time.perf_counter_ns()
        n = softmax.height
        highest = z.amax(1)
        below = z - highest[:, None]
        top, total = softmax.top[:n].clone(), softmax.total[:n].clone()
        took = time.perf_counter_ns() - started
        p, old, new = softmax.take(first, end, z)
        started = time.perf_counter_ns() - took
        mean = below.mul_(p).sum(1)
        moment = mean.add_(highest - softmax.top[:n]).mul_(new[:, 0])
        if self._moment is not None:
            moment += self._moment.add_((top - softmax.top[:n]).mul_(total)).mul_(old[:, 0])
        self._moment = moment
        self._charge(time.perf_counter_ns() - started, [rows for rows in self._wanted if rows.spec.entropy])
        return p, old, new

    def finish(self, softmax: Softmax) -> None:
        """Write what was found of the rows, after all blocks."""
        n = softmax.height
        log_total = softmax.log_total()
        for rows in self._wanted:
            ours, chunk = self._overlap(rows)
            if rows.logsumexp is not None:
                rows.logsumexp[ours] = (softmax.top[:n] + log_total)[chunk]
            if rows.entropy is not None and self._moment is not None:
                # Rounding must not make a sure thing less than certain.
                rows.entropy[ours] = (log_total - self._moment / softmax.total[:n]).clamp_min_(0.0)[chunk]
            if rows.top_logprobs is not None and rows.top_tokens is not None and self._top is not None:
                values, columns = (part[chunk, : rows.spec.top_k] for part in self._top)
                rows.top_tokens[ours] = columns
                rows.top_logprobs[ours] = (values - softmax.top[:n][chunk, None]).sub_(log_total[chunk, None])
            if rows.target_logprobs is not None:
                rows.target_logprobs[ours] -= softmax.top[:n][chunk, None]
                rows.target_logprobs[ours] -= log_total[chunk, None]
            if rows.draws is not None:
                rows.draws.finish(ours, (softmax.top[:n] + log_total)[chunk, None])

    def _overlap(self, rows: Rows) -> tuple[slice, slice]:
        """Which of `rows` are in the chunk, and where."""
        start, stop = max(rows.start, self._start), min(rows.stop, self._stop)
        return slice(start - rows.start, stop - rows.start), slice(start - self._start, stop - self._start)


def largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """([C, k] largest of z [C, B], their columns), in descending order; of equal ones the lower column first."""
    values, columns = z.topk(k, 1)
    # topk takes any of those that equal the last: in rows with more of these than places, sorting decides.
    crowded = (z >= values[:, -1:]).sum(1) > k
    if bool(crowded.any()):
        ordered = z[crowded].sort(dim=1, descending=True, stable=True)
        values[crowded], columns[crowded] = ordered.values[:, :k], ordered.indices[:, :k]
    columns, order = columns.sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _join(
    before: tuple[Tensor, Tensor] | None, block: tuple[Tensor, Tensor], first: int, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest of earlier blocks and of one that begins at column `first`."""
    values, columns = block[0], block[1] + first
    if before is None:
        return values, columns
    # Earlier columns are lower and come first: a stable sort keeps them before their equals.
    values, order = torch.cat((before[0], values), 1).sort(dim=1, descending=True, stable=True)
    return values[:, :k], torch.cat((before[1], columns), 1).gather(1, order)[:, :k]
