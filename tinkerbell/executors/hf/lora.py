"""The linear layer of many adapters: one frozen weight, low-rank deltas on ranges of rows.

Shapes: T rows, I input features, O output features, R rank.
y = x W^T + bias, and for the rows of each range: y += scale (x A^T) B^T (Hu et al. 2021, arXiv 2106.09685).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinkerbell.executors.hf.gemm import mm_few, mm_split, rows

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
        y = mm_few(x, weight, bounds) if few_rows else mm_split(x, weight.t(), bounds)
        if bias is not None:
            y += bias
        down: list[Tensor] = []
        for r in ranges:
            pair = r.adapter.weights.pairs[name]
            h = torch.mm(rows(x, r.start, r.stop), pair.A.t().to(x.dtype))
            add_rows(y, r.start, r.stop, h, pair.B.t().to(x.dtype), r.adapter.scale)
            down.append(h)
        ctx.name, ctx.ranges, ctx.bounds = name, ranges, bounds
        # x is kept for the gradients of A only; without a LoRA here that is nothing.
        ctx.save_for_backward(x if any(r.gradient is not None for r in ranges) else None, weight, *down)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """gx = gy W + scale (gy B) A; gB = scale gy^T (x A^T); gA = scale (gy B)^T x."""
        (gy,) = grad_outputs
        x, weight, *down = ctx.saved_tensors
        gy = gy.contiguous()  # so that a slice has the same strides whatever the number of rows
        gx = mm_split(gy, weight, ctx.bounds) if ctx.needs_input_grad[0] else None
        for r, h in zip(ctx.ranges, down, strict=True):
            pair = r.adapter.weights.pairs[ctx.name]
            g = rows(gy, r.start, r.stop)
            gh = torch.mm(g, pair.B.to(g.dtype))
            if r.gradient is not None:
                into = r.gradient.pairs[ctx.name]
                accumulate(into.B, g.t(), h, r.adapter.scale)
                accumulate(into.A, gh.t(), rows(x, r.start, r.stop), r.adapter.scale)
            if gx is not None:
                add_rows(gx, r.start, r.stop, gh, pair.A.to(g.dtype), r.adapter.scale)
        return gx, None, None, None, None, None, None, None


def add_rows(y: Tensor, start: int, stop: int, a: Tensor, b: Tensor, scale: float) -> None:
    """y[start:stop] += scale * (a @ b), with the alignment care of `rows`."""
    part = y[start:stop]
    aligned = rows(y, start, stop)
    aligned.addmm_(a, b, alpha=scale)
    if aligned is not part and aligned.data_ptr() != part.data_ptr():
        part.copy_(aligned)


def accumulate(into: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """into += scale * (a @ b), in `into`'s dtype."""
    if into.dtype == a.dtype:
        into.addmm_(a, b, alpha=scale)
    else:
        into.add_(torch.mm(a, b), alpha=scale)
