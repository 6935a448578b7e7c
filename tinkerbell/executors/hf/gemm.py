"""Matrix products over rows of several micro-batches that leave every row the bits it has in any company.

A kernel may round a row's sums in another order for each shape of the product, so a product over a whole pass would
give a row other bits in other company. But products of many heights (numbers of rows) share one order, and then rows
can be cut and joined at will. Which do is tried out on the model's own weights before it is relied upon.

Shapes: T rows of a pass, K inner size, N columns, O and I output and input features of a layer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

LANES = 64
"""No kernel's loop over vectors takes more numbers at once."""

Product = Callable[[Tensor, tuple[int, ...]], Tensor]
"""x [T, K] and where to cut it -> [T, N]."""

GRAIN = 8
"""Passes have a multiple of so many rows, and so has every product over rows of several micro-batches."""

HEIGHTS = (256, 128, 64, 32, 16, 8)
"""Tried out first: any pass can be cut into these."""

TALLEST = 528
"""A product of more rows gains nothing on a CPU."""

BLOCK = 1024
"""Columns of the unembedding in one product: all at once, rearranging the weights costs as much as a product of few
rows; and logits that do not fit into the cache are read from memory for every step of their softmax."""


def rows(x: Tensor, start: int, stop: int) -> Tensor:
    """x[start:stop], copied where the slice does not begin on a 64-byte boundary.

    A GEMM may take another path, with other rounding, for another alignment of its operands; the slice has to
    look as it does when it begins its own tensor.
    """
    return aligned(x[start:stop])


def aligned(part: Tensor) -> Tensor:
    """See `rows`."""
    return part if part.is_cuda or part.data_ptr() % 64 == 0 else part.clone()


def mm_split(x: Tensor, w: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """x [T, K] @ w [K, N], one product for each interval of rows of `bounds`."""
    if len(bounds) == 2:
        return torch.mm(x, w)
    out = x.new_empty(x.shape[0], w.shape[1])
    for start, stop in pairwise(bounds):
        part = out[start:stop]
        if part.is_cuda or part.data_ptr() % 64 == 0:
            torch.mm(rows(x, start, stop), w, out=part)
        else:
            part.copy_(torch.mm(rows(x, start, stop), w))
    return out


def mm_few(x: Tensor, weight: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """x [T, K] @ weight [N, K]^T where T is so small that reading the weights takes the time: oneDNN reads them as they
    lie, where `mm` copies them first. Without gradients."""
    if x.dtype != torch.float32 or x.is_cuda or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return mm_split(x, weight.t(), bounds)
    parts = [
        torch.ops.mkldnn._linear_pointwise(rows(x, start, stop), weight, None, "none", [], "")
        for start, stop in pairwise(bounds)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def softmax_in_place(z: Tensor) -> Tensor:
    """z [C, V] becomes its softmax, each row by itself: this kernel's vector loops begin anew with every row."""
    return torch.softmax(z, -1, out=z)


def in_whole_vectors(width: int) -> bool:
    """Whether a kernel that works on vectors, whatever number of threads it uses, leaves none of the numbers of rows so
    wide to the remainder of a loop, which may round otherwise."""
    return width % (LANES * math.lcm(*range(1, torch.get_num_threads() + 1))) == 0


def filled(num_rows: int) -> int:
    """The next multiple of GRAIN."""
    return -(-num_rows // GRAIN) * GRAIN


def cuts(num_rows: int) -> tuple[int, ...]:
    """0 = first < ... < last = `num_rows`, a multiple of GRAIN: where products of HEIGHTS meet."""
    assert num_rows % GRAIN == 0
    found = [0]
    for height in HEIGHTS:
        while num_rows - found[-1] >= height:
            found.append(found[-1] + height)
    return tuple(found)


class Heights:
    """Which heights of a product keep the bits of its rows, tried out on random rows: with another order of its sums
    hardly any element would. What is found holds for the number of threads it was found with."""

    def __init__(self, layers: Sequence[Tensor], head: Tensor) -> None:
        """`layers`: a weight [O, I] of each shape and memory layout; `head`: the unembedding's [V, D]."""
        last = head.shape[0] % BLOCK
        self._head = [block for block in (head[:BLOCK], head[head.shape[0] - last :]) if len(block)]
        self._layers = layers
        self._known: dict[tuple[int, int], bool] = {}
        """By number of threads and height; height 0: all of HEIGHTS."""

    def alike(self) -> bool:
        """Whether all of HEIGHTS do. Never on CUDA, where nobody has tried."""
        key = (torch.get_num_threads(), 0)
        if key not in self._known:
            self._known[key] = self._head[0].device.type == "cpu" and all(
                _places_alike(product, width, like)
                and all(_cut_alike(product, width, height, like) for height in HEIGHTS[:-1])
                for product, width, like in self._products()
            )
        return self._known[key]

    def cuts(self, num_rows: int) -> tuple[int, ...]:
        """0 = first < ... < last = `num_rows`, a multiple of GRAIN: where to cut, as rarely as bits allow.

        A height that was not used before is tried out first. `alike` must hold.
        """
        found = [0]
        # About even: products of a short rest run at a poor rate.
        even = filled(-(-num_rows // -(-num_rows // TALLEST)))
        while found[-1] < num_rows:
            start = found[-1]
            height = min(even, num_rows - start)
            found += [start + cut for cut in ((height,) if self._keeps_bits(height) else cuts(height)[1:])]
        return tuple(found)

    def _keeps_bits(self, height: int) -> bool:
        if height in HEIGHTS:
            return True
        key = (torch.get_num_threads(), height)
        if key not in self._known:
            self._known[key] = all(
                _cut_alike(product, width, height, like) for product, width, like in self._products()
            )
        return self._known[key]

    def _products(self) -> Iterator[tuple[Product, int, Tensor]]:
        """What linear layers do forward and backward, with the inner size and the weight."""
        for forward, weights in ((_forward, self._layers), (_logits_then_softmax, self._head)):
            for weight in weights:
                yield partial(forward, weight), weight.shape[1], weight
                yield partial(_backward, weight), weight.shape[0], weight


def _forward(weight: Tensor, x: Tensor, at: tuple[int, ...]) -> Tensor:
    return mm_split(x, weight.t(), at)


def _backward(weight: Tensor, x: Tensor, at: tuple[int, ...]) -> Tensor:
    return mm_split(x, weight, at)


def _logits_then_softmax(weight: Tensor, x: Tensor, at: tuple[int, ...]) -> Tensor:
    parts = [torch.mm(rows(x, start, stop), weight.t()) for start, stop in pairwise(at)]
    return torch.cat([softmax_in_place(part) for part in parts])


@torch.no_grad()
def _places_alike(product: Product, width: int, like: Tensor) -> bool:
    """Whether a row has the same bits at every place of a product of GRAIN rows."""
    x = _random(GRAIN, width, like)
    expected = product(x, (0, GRAIN))
    return all(torch.equal(product(x.roll(shift, 0), (0, GRAIN)), expected.roll(shift, 0)) for shift in range(1, GRAIN))


@torch.no_grad()
def _cut_alike(product: Product, width: int, height: int, like: Tensor) -> bool:
    """Whether a product of so many rows gives the bits of products of the heights it can be cut into."""
    x = _random(height, width, like)
    lower = tuple(range(0, height + 1, height // 2)) if height in HEIGHTS else cuts(height)
    return torch.equal(product(x, (0, height)), product(x, lower))


def _random(num_rows: int, width: int, like: Tensor) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(width)).to(like)
