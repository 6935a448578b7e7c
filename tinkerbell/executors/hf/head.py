"""Logprobs of given targets without ever holding the logits of a whole pass.

Shapes: N rows of one micro-batch, C rows of one chunk, D hidden size, V vocabulary, R LoRA rank.

With z = W x + b: logp = z[y] - logsumexp(z), and d logp / d x = W[y] - softmax(z) W does not depend on the loss.
So forward computes that row beside the logprob, and backward of any loss of logprobs multiplies row n by
dLoss/dlogp[n]. A LoRA on the head needs gradients that do depend on the loss; its backward computes each chunk's
logits again.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tinkerbell.executors.hf.lora import MultiLoraLinear, accumulate, rows
from tinkerbell.executors.hf.runtime import Pass, RowRange, Runtime

CHUNK_ROWS = 128
"""C: rows of logits held at once. Part of what decides bits, hence no option."""


def target_logprobs(runtime: Runtime, hidden: Tensor, targets: Tensor, plan: Pass) -> Tensor:
    """[T] nats, fp32 (fp64 for an fp64 model): logprob of targets [T] int64 given hidden [T, D] of a pass.

    Micro-batch by micro-batch; `plan` is the pass that gave `hidden`.
    """
    head = runtime.head
    by_start = {r.start: r for r in plan.on(head.name)}
    parts: list[Tensor] = []
    start = 0
    for x, y in zip(torch.split(hidden, plan.sizes), torch.split(targets, plan.sizes), strict=True):
        lora = by_start.get(start)
        if lora is None:
            parts.append(_apply(_TargetLogprob, x, head.weight, head.bias, y))
        else:
            assert lora.stop == start + x.shape[0], "a LoRA on the head covers its whole micro-batch"
            parts.append(_apply(_LoraTargetLogprob, x, runtime.anchor, head, lora, y))
        start += x.shape[0]
    return torch.cat(parts)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    apply: Callable[..., Tensor] = function.apply
    return apply(*args)


def _chunks(num_rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, CHUNK_ROWS):
        yield start, min(start + CHUNK_ROWS, num_rows)


def _softmax_in_place(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z [C, V] becomes exp(z - max); returns (exp(z - max), its row sums [C, 1], logprob of y [C])."""
    target = z.gather(1, y[:, None])
    z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
    top = z.amax(1, keepdim=True)
    z.sub_(top).exp_()
    total = z.sum(1, keepdim=True)
    logprob = (target.to(z.dtype) - top - total.log()).squeeze(1)
    return z, total, logprob


class _TargetLogprob(torch.autograd.Function):
    """x [N, D], targets [N] -> [N]; backward is a row scaling."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        logprobs: list[Tensor] = []
        jacobian = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_grad else None
        buffer = x.new_empty(min(CHUNK_ROWS, x.shape[0]), weight.shape[0])
        for start, stop in _chunks(x.shape[0]):
            y = targets[start:stop]
            z = torch.mm(rows(x, start, stop), weight.t(), out=buffer[: stop - start])
            if bias is not None:
                z += bias
            z, total, logprob = _softmax_in_place(z, y)
            logprobs.append(logprob)
            if jacobian is not None:
                mean = torch.mm(z.to(weight.dtype), weight).div_(total)
                torch.sub(weight.index_select(0, y), mean, out=jacobian[start:stop])
        if jacobian is not None:
            ctx.save_for_backward(jacobian)
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (jacobian,) = ctx.saved_tensors
        return jacobian * grad_outputs[0].unsqueeze(1).to(jacobian.dtype), None, None, None


class _LoraTargetLogprob(torch.autograd.Function):
    """The same with z = W x + b + scale B A x; backward also yields the gradients of A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, head: MultiLoraLinear, lora: RowRange, targets: Tensor) -> Tensor:
        logprobs: list[Tensor] = []
        for start, stop in _chunks(x.shape[0]):
            z, _ = _lora_logits(rows(x, start, stop), head, lora)
            logprobs.append(_softmax_in_place(z, targets[start:stop])[2])
        ctx.head, ctx.lora = head, lora
        ctx.save_for_backward(x, targets)
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, targets = ctx.saved_tensors
        head, lora = ctx.head, ctx.lora
        pair, scale = lora.adapter.weights.pairs[head.name], lora.adapter.scale
        gx = torch.empty_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        for start, stop in _chunks(x.shape[0]):
            part, y = rows(x, start, stop), targets[start:stop]
            z, h = _lora_logits(part, head, lora)
            p, total, _ = _softmax_in_place(z, y)
            # d logp / d z = onehot(y) - softmax(z), times dLoss/dlogp
            gz = p.div_(total).neg_()
            gz.scatter_add_(1, y[:, None], torch.ones_like(y, dtype=gz.dtype)[:, None])
            gz = gz.mul_(grad_outputs[0][start:stop, None].to(gz.dtype)).to(x.dtype)
            gh = torch.mm(gz, pair.B.to(x.dtype))
            if lora.gradient is not None:
                into = lora.gradient.pairs[head.name]
                accumulate(into.B, gz.t(), h, scale)
                accumulate(into.A, gh.t(), part, scale)
            if gx is not None:
                gx[start:stop] = torch.mm(gz, head.weight).addmm_(gh, pair.A.to(x.dtype), alpha=scale)
        return gx, None, None, None, None


def _lora_logits(x: Tensor, head: MultiLoraLinear, lora: RowRange) -> tuple[Tensor, Tensor]:
    """x [C, D] -> (logits [C, V], x A^T [C, R])."""
    pair = lora.adapter.weights.pairs[head.name]
    z = torch.mm(x, head.weight.t())
    if head.bias is not None:
        z += head.bias
    h = torch.mm(x, pair.A.t().to(x.dtype))
    z.addmm_(h, pair.B.t().to(x.dtype), alpha=lora.adapter.scale)
    return z, h
