"""What this machine can do at most: its fp32 GEMM rate on the shapes of a model's own linear layers.

Shapes: T rows, I input features, O output features of a layer with weight [O, I].
"""

import time
from collections import Counter
from collections.abc import Iterable

import torch

from tinkerbell.executors.hf.adapter import LinearShape

ROWS = 512
"""T: from about 128 rows on a CPU's rate hardly rises."""
FLOPS_PER_WEIGHT = 4
"""For each token: a multiplication and an addition forward, and as much for the gradient of the input. The frozen
weights get none."""
FLOPS_PER_LORA_WEIGHT = 6
"""These do."""


class _Product:
    """One shape's products on operands of ones; their memory is taken once, so that only GEMMs are timed."""

    def __init__(self, o: int, i: int) -> None:
        self._weight = torch.ones(o, i)
        self._x, self._gx = torch.ones(ROWS, i), torch.ones(ROWS, i)
        self._y, self._gy = torch.ones(ROWS, o), torch.ones(ROWS, o)
        self.least_s = float("inf")
        """CPU seconds of both products."""

    def measure(self) -> None:
        """Run them once more."""
        began = time.process_time()
        torch.mm(self._x, self._weight.t(), out=self._y)
        torch.mm(self._gy, self._weight, out=self._gx)
        self.least_s = min(self.least_s, time.process_time() - began)


class Gemms:
    """The products of a model's linear layers, forward and backward, and the least CPU seconds each was seen to
    take."""

    def __init__(self, layers: Iterable[LinearShape]) -> None:
        """`layers`: every linear layer, the unembedding included."""
        self._counts = Counter((shape.out_features, shape.in_features) for shape in layers)
        self._products = {shape: _Product(*shape) for shape in self._counts}

    @property
    def num_weights(self) -> int:
        """Of all layers."""
        return sum(o * i * count for (o, i), count in self._counts.items())

    @torch.no_grad()
    def measure(self) -> None:
        """Run every product once more."""
        for product in self._products.values():
            product.measure()

    def flops_per_cpu_s(self) -> float:
        """Over all layers as the model has them; they must have been measured."""
        seconds = sum(self._products[shape].least_s * count for shape, count in self._counts.items())
        return FLOPS_PER_WEIGHT * ROWS * self.num_weights / seconds

    def least_cpu_s(self, num_tokens: int, lora_token_weights: int) -> float:
        """CPU seconds that forward and backward of so many tokens take if nothing but GEMMs takes time.

        `lora_token_weights`: sum over tokens of the parameters of the token's own adapter.
        """
        flops = FLOPS_PER_WEIGHT * self.num_weights * num_tokens + FLOPS_PER_LORA_WEIGHT * lora_token_weights
        return flops / self.flops_per_cpu_s()
