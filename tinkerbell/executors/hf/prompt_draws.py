"""Tokens drawn from the distributions at the positions of a prompt, block by block of the vocabulary.

Shapes: N rows, k draws at each, C rows of a chunk, B columns of a block.

One number u in [0, 1) decides a draw. After each block it either takes a token of that block, with the block's share p
of the weight so far, or leaves what an earlier one gave: u < p takes it, and then u / p is uniform again and chooses
within the block; otherwise (u - p) / (1 - p) is, and decides the blocks that follow. What is left at the end is a draw
from the whole vocabulary (Chao 1982, doi 10.1093/biomet/69.3.653, with one place), without holding more than a block
of logits.
"""

import torch
from torch import Tensor

from tinkerbell.executors.randomness import PROMPT, uniform


class Draws:
    """k tokens for each of N rows."""

    def __init__(self, num_rows: int, k: int, temperature: float, seed: int, like: Tensor) -> None:
        """`temperature` > 0. The draws of row n are a function of (seed, draw, n). In the dtype and on the device of
        `like`."""
        places = [[uniform(seed, draw, row, PROMPT) for draw in range(k)] for row in range(num_rows)]
        self._u = torch.tensor(places, dtype=torch.float64, device=like.device).view(num_rows, k)
        self._temperature = temperature
        self._log_weight = self._u.new_full((num_rows, 1), -torch.inf)
        """[N, 1] of all blocks so far, of exp(z / temperature)."""
        self.tokens = torch.zeros(num_rows, k, dtype=torch.int64, device=like.device)
        """[N, k]"""
        self.logprobs = like.new_zeros(num_rows, k)
        """[N, k]; until `finish` the logits of the tokens."""

    def take(self, rows: slice, first: int, z: Tensor) -> None:
        """z [C, B]: logits of `rows` in columns from `first` on."""
        highest = z.amax(1, keepdim=True).double()
        cumulative = (z.double() - highest).div_(self._temperature).exp_().cumsum_(1)
        total = cumulative[:, -1:].contiguous()
        log_weight = highest / self._temperature + total.log()
        before, u = self._log_weight[rows], self._u[rows]
        self._log_weight[rows] = torch.logaddexp(before, log_weight)
        share = torch.exp(log_weight - self._log_weight[rows])
        taken = u < share
        self._u[rows] = torch.where(taken, u / share, (u - share) / (1 - share))
        # Rounding of a product must not choose a token behind the last that has any weight.
        last = torch.searchsorted(cumulative, total)
        wanted = torch.where(taken, u / share, 0.0) * total
        column = torch.minimum(torch.searchsorted(cumulative, wanted, right=True), last)
        self.tokens[rows] = torch.where(taken, column + first, self.tokens[rows])
        self.logprobs[rows] = torch.where(taken, z.gather(1, column), self.logprobs[rows])

    def finish(self, rows: slice, logsumexp: Tensor) -> None:
        """logsumexp [C, 1] of the logits of `rows`, after all blocks."""
        self.logprobs[rows] -= logsumexp
