"""Tokens drawn from the distributions at the positions of a prompt, block by block of the vocabulary.

Shapes: N rows, k draws at each, C rows of a chunk, B columns of a block.

Each block either gives a draw its token, with the block's share p of the weight so far, or leaves what an earlier one
gave: what is left at the end is a draw from the whole vocabulary (Chao 1982, doi 10.1093/biomet/69.3.653, with one
place), without holding more than a block of logits. A draw has two numbers in [0, 1). One, u, decides the blocks: u < p
takes this one, and then u / p is uniform again, otherwise (u - p) / (1 - p) is, for those that follow. The other says
which token of a block it is that was taken; it must not be u, which knows what the blocks that follow will do.
"""

import torch
from torch import Tensor

from tinkerbell.executors.progress import mark
from tinkerbell.executors.randomness import PROMPT, uniform


class Draws:
    """k tokens for each of N rows."""

    def __init__(self, num_rows: int, draws: range, temperature: float, seed: int, like: Tensor) -> None:
        """`temperature` > 0. Each of the k `draws` of row n is a function of (seed, draw, n). In the dtype and on the
        device of `like`."""
        k = len(draws)
        numbers = [
            [uniform(seed, n, row, PROMPT) for n in range(2 * draws.start, 2 * draws.stop)] for row in range(num_rows)
        ]
        mark()
        both = torch.tensor(numbers, dtype=torch.float64, device=like.device).view(num_rows, k, 2)
        self._u, self._place = both[..., 0].contiguous(), both[..., 1].contiguous()
        """[N, k]"""
        self._temperature = temperature
        self._top = self._u.new_full((num_rows, 1), torch.finfo(torch.float32).min)
        """[N, 1] largest logit so far."""
        self._weight = self._u.new_zeros(num_rows, 1)
        """[N, 1] sum of exp((z - top) / temperature) so far."""
        self.tokens = torch.zeros(num_rows, k, dtype=torch.int64, device=like.device)
        """[N, k]"""
        self.logprobs = like.new_zeros(num_rows, k)
        """[N, k]; until `finish` the logits of the tokens."""

    def take(self, rows: slice, first: int, z: Tensor) -> None:
        """z [C, B]: logits of `rows` in columns from `first` on."""
        before, u = self._top[rows], self._u[rows]
        top = torch.maximum(before, z.amax(1, keepdim=True).double())
        # Of differences: a temperature close to 0 must not overflow.
        cumulative = (z.double() - top).div_(self._temperature).exp_().cumsum_(1)
        total = cumulative[:, -1:].contiguous()
        weight = self._weight[rows] * ((before - top) / self._temperature).exp_() + total
        self._top[rows], self._weight[rows] = top, weight
        # Where no token had any weight yet, none is taken.
        share = torch.where(weight > 0, total / weight, 0.0)
        taken = u < share
        self._u[rows] = torch.where(taken, u / share, (u - share) / (1 - share))
        # Rounding of a product must not choose a token behind the last that has any weight.
        last = torch.searchsorted(cumulative, total)
        column = torch.minimum(torch.searchsorted(cumulative, self._place[rows] * total, right=True), last)
        self.tokens[rows] = torch.where(taken, column + first, self.tokens[rows])
        self.logprobs[rows] = torch.where(taken, z.gather(1, column), self.logprobs[rows])

    def finish(self, rows: slice, logsumexp: Tensor) -> None:
        """logsumexp [C, 1] of the logits of `rows`, after all blocks."""
        self.logprobs[rows] -= logsumexp
