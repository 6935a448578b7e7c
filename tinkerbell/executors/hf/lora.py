"""The linear layer of many adapters: one frozen weight, low-rank deltas on ranges of rows.

Shapes: T rows, I input features, O output features, R rank.
y = x W^T + bias, and for the rows of each range: y += scale (x A^T) B^T (Hu et al. 2021, arXiv 2106.09685).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinkerbell.executors.hf.gemm import aligned, mm_few, mm_split
from tinkerbell.executors.progress import mark

if TYPE_CHECKING:
    from tinkerbell.executors.hf.runtime import RowRange, Runtime


class MultiLoraLinear(nn.Module):
    """Takes the place of an `nn.Linear`; must be called within a pass."""

    def __init__(self, base: nn.Linear, name: str, runtime: "Runtime") -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.name = name
        """Full module name, the key of the adapters' factors."""
        self._runtime = runtime

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]; the leading dimensions multiply to T."""
        plan = self._runtime.current
        apply: Callable[..., Tensor] = MultiLoraFn.apply
        y = apply(
            x.reshape(-1, self.in_features), self._runtime.anchor, self.weight, self.bias,
            self.name, plan.on(self.name), plan.bounds, plan.few_rows,
        )  # fmt: skip
        return y.view(*x.shape[:-1], self.out_features)


class MultiLoraFn(torch.autograd.Function):
    """Forward and backward of MultiLoraLinear. The base weight gets no gradient, ever.

    LoRA gradients are added to the range's own buffer, so no sum ever runs over the rows of two ranges: a NaN in
    one cannot reach another, and neither can its rounding.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        name: str,
        ranges: "list[RowRange]",
        bounds: tuple[int, ...],
        few_rows: bool,
    ) -> Tensor:
        """x [T, I], weight [O, I] -> [T, O]. `anchor` makes autograd record this where x needs no gradient."""
        mark()
        y = mm_few(x, weight, bounds) if few_rows else mm_split(x, weight.t(), bounds)
        if bias is not None:
            y += bias
        down: list[Tensor] = []
        for r, x_r, y_r in zip(ranges, _parts(x, ranges), _parts(y, ranges), strict=True):
            pair = r.adapter.weights.pairs[name]
            h = torch.mm(aligned(x_r), pair.A.t().to(x.dtype))
            _add(y_r, h, pair.B.t().to(x.dtype), r.adapter.scale)
            down.append(h)
        ctx.name, ctx.ranges, ctx.bounds = name, ranges, bounds
        # x is kept for the gradients of A only; without a LoRA here that is nothing.
        ctx.save_for_backward(x if any(r.gradient is not None for r in ranges) else None, weight, *down)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """gx = gy W + scale (gy B) A; gB = scale gy^T (x A^T); gA = scale (gy B)^T x."""
        mark()
        (gy,) = grad_outputs
        x, weight, *down = ctx.saved_tensors
        gy = gy.contiguous()  # so that a slice has the same strides whatever the number of rows
        gx = mm_split(gy, weight, ctx.bounds) if ctx.needs_input_grad[0] else None
        nothing: list[None] = [None] * len(down)
        xs = nothing if x is None else _parts(x, ctx.ranges)
        gxs = nothing if gx is None else _parts(gx, ctx.ranges)
        for r, h, x_r, g_r, gx_r in zip(ctx.ranges, down, xs, _parts(gy, ctx.ranges), gxs, strict=True):
            pair = r.adapter.weights.pairs[ctx.name]
            g = aligned(g_r)
            gh = torch.mm(g, pair.B.to(g.dtype))
            if r.gradient is not None and x_r is not None:
                into = r.gradient.pairs[ctx.name]
                accumulate(into.B, g.t(), h, r.adapter.scale)
                accumulate(into.A, gh.t(), aligned(x_r), r.adapter.scale)
            if gx_r is not None:
                _add(gx_r, gh, pair.A.to(g.dtype), r.adapter.scale)
        return gx, None, None, None, None, None, None, None


def _parts(x: Tensor, ranges: "Sequence[RowRange]") -> list[Tensor]:
    """Views of the rows of each range."""
    sizes: list[int] = []
    end = 0
    for r in ranges:
        sizes += [r.start - end, r.stop - r.start]
        end = r.stop
    # One call for all: each slice by itself costs as much as a small product.
    return list(torch.split(x, [*sizes, len(x) - end])[1::2])


def _add(part: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """part += scale * (a @ b), with the alignment care of `rows`."""
    into = aligned(part)
    into.addmm_(a, b, alpha=scale)
    if into is not part:
        part.copy_(into)


def accumulate(into: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """into += scale * (a @ b), in `into`'s dtype."""
    if into.dtype == a.dtype:
        into.addmm_(a, b, alpha=scale)
    else:
        into.add_(torch.mm(a, b), alpha=scale)
