"""Logprobs of given targets without ever holding the logits of a whole pass.

Shapes: T rows of a pass, N rows of one run, K targets of each, C rows of one chunk, D hidden size, V vocabulary, B
columns of one block of the vocabulary, R LoRA rank.

With z = W x + b: logp = z[y] - logsumexp(z), and d logp / d x = W[y] - softmax(z) W does not depend on the loss.
So forward computes that row beside the logprob, and backward of any loss of logprobs multiplies row n by
dLoss/dlogp[n]. Of several targets of a row it keeps softmax(z) W, which they share, and backward adds up W[y]. A LoRA
on the head needs gradients that do depend on the loss; its backward computes each block's logits again. Blocks of the
vocabulary are joined by their largest logit and sum (Milakov, Gimelshein 2018, arXiv 1805.02867), so that what is at
work fits into the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tinkerbell.executors.hf.gemm import BLOCK, LANES, Heights, filled, rows, softmax_in_place
from tinkerbell.executors.hf.lora import MultiLoraLinear, accumulate
from tinkerbell.executors.hf.runtime import Pass, RowRange, Runtime
from tinkerbell.executors.progress import mark

CHUNK_ROWS = 512
"""C where a micro-batch goes through the head by itself. Part of what decides bits, hence no option."""


class Run(NamedTuple):
    """Neighbouring rows of a pass that go through the head together."""

    start: int
    stop: int
    heights: Heights | None
    """Of products over rows of several micro-batches; None where it is one micro-batch or bits do not matter."""
    lora: RowRange | None
    """The LoRA on the head of these rows."""
    targets: Tensor
    """[N, K]"""

    @property
    def alone(self) -> bool:
        """Whether it is one micro-batch that can have no company."""
        return self.lora is not None or self.targets.shape[1] > 1

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """(first row, one past the last, height of the product), from 0 at this run's start."""
        n = self.stop - self.start
        if self.heights is not None:
            for start, stop in pairwise(self.heights.cuts(filled(n))):
                yield start, min(stop, n), stop - start
        else:
            for start in range(0, n, CHUNK_ROWS):
                stop = min(start + CHUNK_ROWS, n)
                yield start, stop, stop - start


def runs(runtime: Runtime, plan: Pass, targets: Sequence[Tensor]) -> list[Run]:
    """Cover the rows of a pass, in order, but for those that fill it up behind the last micro-batch. A LoRA on the head
    makes its micro-batch a run of its own, and so do several targets of a row."""
    by_start = {r.start: r for r in plan.on(runtime.head.name)}
    found: list[Run] = []
    for (start, stop), y in zip(pairwise(plan.apart[: len(targets) + 1]), targets, strict=True):
        lora = by_start.get(start)
        assert lora is None or lora.stop == stop, "a LoRA on the head covers its whole micro-batch"
        run = Run(start, stop, None, lora, y)
        if not run.alone:
            run = run._replace(heights=plan.heights)
            if plan.micro_batches is not None and found and not found[-1].alone:
                before = found.pop()
                run = run._replace(start=before.start, targets=torch.cat((before.targets, y)))
        found.append(run)
    return found


def target_logprobs(
    runtime: Runtime, hidden: Tensor, targets: Sequence[Tensor], plan: Pass, observer: "Observer | None" = None
) -> Tensor:
    """Nats, fp32 (fp64 for an fp64 model), in one dimension: logprobs of the targets [N, K] int64 of each micro-batch,
    given hidden [T, D] of a pass.

    `plan` is the pass that gave `hidden`; `observer` sees every block of logits on its way.
    """
    found = runs(runtime, plan, targets)
    parts: list[Tensor] = []
    sizes = [run.stop - run.start for run in found]
    for run, x in zip(found, torch.split(hidden, [*sizes, len(hidden) - sum(sizes)]), strict=False):
        function: type[torch.autograd.Function] = _TargetLogprob
        if run.lora is not None:
            function = _LoraTargetLogprob
        elif run.targets.shape[1] > 1:
            function = _SeveralTargetLogprobs
        apply: Callable[..., Tensor] = function.apply
        parts.append(apply(x, runtime.anchor, runtime.head, run, observer).flatten())
    return torch.cat(parts)


def chunk_rows(x: Tensor, start: int, stop: int, height: int) -> Tensor:
    """[height, D]: rows [start, stop) of x, filled up with zeros."""
    part = rows(x, start, stop)
    return part if height == stop - start else torch.cat((part, part.new_zeros(height - (stop - start), x.shape[1])))


def logit_blocks(x: Tensor, head: MultiLoraLinear, lora: RowRange | None) -> Iterator[tuple[int, int, Tensor]]:
    """(first column, one past the last, logits [C, B] in at least fp32) of x [C, D]; the next block overwrites them."""
    buffer = x.new_empty(x.shape[0] * BLOCK)
    down = None
    if lora is not None:
        pair = lora.adapter.weights.pairs[head.name]
        down = torch.mm(x, pair.A.t().to(x.dtype))
    for start in range(0, head.out_features, BLOCK):
        mark()
        stop = min(start + BLOCK, head.out_features)
        z = buffer[: x.shape[0] * (stop - start)].view(x.shape[0], stop - start)
        torch.mm(x, head.weight[start:stop].t(), out=z)
        if head.bias is not None:
            z += head.bias[start:stop]
        if lora is not None and down is not None:
            z.addmm_(down, pair.B[start:stop].t().to(x.dtype), alpha=lora.adapter.scale)
        yield start, stop, z.float() if z.dtype in (torch.bfloat16, torch.float16) else z


class Softmax:
    """What is known of the softmax of C rows after some blocks of the vocabulary."""

    def __init__(self, targets: Tensor, height: int, dtype: torch.dtype) -> None:
        """targets [N, K], N <= C = `height`; `dtype` of the logits."""
        self.height = height
        self._targets = torch.nn.functional.pad(targets, (0, 0, 0, height - len(targets)))
        # Filled up, so that no number is in the remainder of a loop over vectors.
        lanes = -(-height // LANES) * LANES
        self.top = torch.full((lanes,), -torch.inf, dtype=dtype, device=targets.device)
        """The largest logit."""
        self.total = torch.zeros_like(self.top)
        """Sum of exp(z - top)."""
        self.target = self.top.new_zeros(self._targets.shape)
        """[C, K] logits of the targets."""

    def take(self, start: int, stop: int, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [C, B], logits of columns [start, stop), becomes its softmax over this block. Returns it, and what a sum
        over earlier blocks [C, 1] and one over this block [C, 1] have to be multiplied by before they are added:
        sums are of exp(z - top)."""
        inside, column = self.targets_in(start, stop)
        torch.where(inside, z.gather(1, column), self.target, out=self.target)
        top, largest = torch.zeros_like(self.top), torch.ones_like(self.top)
        top[: self.height] = z.amax(1)
        p = softmax_in_place(z)
        # The largest probability is 1 / sum(exp(z - max)), rounded once, and spares a second pass over the row.
        largest[: self.height] = p.amax(1)
        before, self.top = self.top, torch.maximum(self.top, top)
        old = before.sub_(self.top).exp_()
        new = top.sub_(self.top).exp_().div_(largest)
        self.total = self.total.mul_(old).add_(new)
        return p, old[: self.height, None], new[: self.height, None]

    def targets_in(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """([C, K] whether a target is among columns [start, stop), [C, K] which of them, any where it is not)."""
        column = self._targets - start
        inside = (column >= 0) & (column < stop - start)
        return inside, column.clamp_(0, stop - start - 1)

    def log_total(self) -> Tensor:
        """[C] log of the sum of exp(z - top)."""
        return self.total.log()[: self.height]

    def logprobs(self) -> Tensor:
        """[C, K] of the targets, after all blocks."""
        return (self.target - self.top[: self.height, None]).sub_(self.log_total()[:, None])


class Sweep(Protocol):
    """Looks at the blocks of one chunk."""

    def take(self, softmax: Softmax, first: int, end: int, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Do what softmax.take does, and return it."""
        ...

    def finish(self, softmax: Softmax) -> None:
        """All blocks were taken."""
        ...


Observer = Callable[[int, int], Sweep]
"""(first row of a pass, one past the last) -> what looks at the logits of this chunk."""


class _Unobserved:
    """The Sweep of a chunk that nobody looks at."""

    def take(self, softmax: Softmax, first: int, end: int, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return softmax.take(first, end, z)

    def finish(self, softmax: Softmax) -> None:
        pass


def _sweep(observer: Observer | None, run: Run, start: int, stop: int) -> Sweep:
    """Of rows [start, stop) of a run."""
    return _Unobserved() if observer is None else observer(run.start + start, run.start + stop)


def _swept(
    x: Tensor, head: MultiLoraLinear, run: Run, observer: Observer | None, *, with_mean: bool
) -> Iterator[tuple[int, int, Softmax, Tensor | None]]:
    """For each chunk of x [N, D]: (first row, one past the last, softmax, [stop - start, D] softmax(z) W if asked)."""
    for start, stop, height in run.chunks():
        part = chunk_rows(x, start, stop, height)
        mean: Tensor | None = None
        product = torch.empty_like(part)
        softmax = Softmax(run.targets[start:stop], height, wide(x.dtype))
        sweep = _sweep(observer, run, start, stop)
        for first, end, z in logit_blocks(part, head, None):
            p, old, new = sweep.take(softmax, first, end, z)
            if with_mean:
                term = torch.mm(p.to(x.dtype), head.weight[first:end], out=product).to(p.dtype).mul_(new)
                mean = term.clone() if mean is None else mean.mul_(old).add_(term)
        sweep.finish(softmax)
        yield start, stop, softmax, None if mean is None else mean.div_(softmax.total[:height, None])[: stop - start]


class _TargetLogprob(torch.autograd.Function):
    """x [N, D], one target each -> [N, 1]; backward is a row scaling."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, head: MultiLoraLinear, run: Run, observer: Observer | None
    ) -> Tensor:
        logprobs: list[Tensor] = []
        jacobian = torch.empty_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        for start, stop, softmax, mean in _swept(x, head, run, observer, with_mean=jacobian is not None):
            logprobs.append(softmax.logprobs()[: stop - start])
            if jacobian is not None and mean is not None:
                jacobian[start:stop] = head.weight.index_select(0, run.targets[start:stop, 0]) - mean
        if jacobian is not None:
            ctx.save_for_backward(jacobian)
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (jacobian,) = ctx.saved_tensors
        return jacobian * grad_outputs[0].to(jacobian.dtype), None, None, None, None


class _SeveralTargetLogprobs(torch.autograd.Function):
    """x [N, D], K targets each -> [N, K]; backward is sum_k g_k W[y_k] - (sum_k g_k) softmax(z) W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, head: MultiLoraLinear, run: Run, observer: Observer | None
    ) -> Tensor:
        logprobs: list[Tensor] = []
        means = torch.empty_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        for start, stop, softmax, mean in _swept(x, head, run, observer, with_mean=means is not None):
            logprobs.append(softmax.logprobs()[: stop - start])
            if means is not None and mean is not None:
                means[start:stop] = mean
        if means is not None:
            ctx.save_for_backward(means)
            ctx.head, ctx.run = head, run
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (means,) = ctx.saved_tensors
        g = grad_outputs[0].to(means.dtype)
        gx = means * -g.sum(1, keepdim=True)
        # W[y] of all targets would be K times as large as x.
        step = max(1, CHUNK_ROWS // g.shape[1])
        for start in range(0, len(gx), step):
            y = ctx.run.targets[start : start + step]
            toward = ctx.head.weight.index_select(0, y.flatten()).view(*y.shape, -1)
            gx[start : start + step] += torch.bmm(g[start : start + step, None], toward).squeeze(1)
        return gx, None, None, None, None


class _LoraTargetLogprob(torch.autograd.Function):
    """x [N, D], K targets each -> [N, K] with z = W x + b + scale B A x; backward also yields the gradients of A and
    B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, head: MultiLoraLinear, run: Run, observer: Observer | None
    ) -> Tensor:
        found: list[Softmax] = []
        for start, stop, height in run.chunks():
            found.append(Softmax(run.targets[start:stop], height, wide(x.dtype)))
            sweep = _sweep(observer, run, start, stop)
            for block in logit_blocks(rows(x, start, stop), head, run.lora):
                sweep.take(found[-1], *block)
            sweep.finish(found[-1])
        ctx.head, ctx.run, ctx.found = head, run, found
        ctx.save_for_backward(x)
        return torch.cat([softmax.logprobs() for softmax in found])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """d logp / d z = onehot(y) - softmax(z), times dLoss/dlogp, summed over a row's targets."""
        (x,) = ctx.saved_tensors
        head, lora = ctx.head, ctx.run.lora
        pair, scale = lora.adapter.weights.pairs[head.name], lora.adapter.scale
        gx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        for (start, stop, height), softmax in zip(ctx.run.chunks(), ctx.found, strict=True):
            part, g = rows(x, start, stop), grad_outputs[0][start:stop]
            down = torch.mm(part, pair.A.t().to(x.dtype))
            gh = torch.zeros_like(down)
            into = rows(gx, start, stop)
            for first, end, z in logit_blocks(part, head, lora):
                p = z.sub_(softmax.top[:height, None]).exp_().div_(softmax.total[:height, None])
                inside, column = softmax.targets_in(first, end)
                if g.shape[1] == 1:
                    gz = p.neg_().scatter_add_(1, column, inside.to(p.dtype)).mul_(g.to(p.dtype)).to(x.dtype)
                else:
                    # Several may be the same token: each adds its own.
                    gz = p.mul_(-g.sum(1, keepdim=True)).scatter_add_(1, column, inside * g.to(p.dtype)).to(x.dtype)
                gh.addmm_(gz, pair.B[first:end].to(x.dtype))
                into.addmm_(gz, head.weight[first:end])
                if lora.gradient is not None:
                    accumulate(lora.gradient.pairs[head.name].B[first:end], gz.t(), down, scale)
            if lora.gradient is not None:
                accumulate(lora.gradient.pairs[head.name].A, gh.t(), part, scale)
            into.addmm_(gh, pair.A.to(x.dtype), alpha=scale)
            if into.data_ptr() != gx[start:stop].data_ptr():
                gx[start:stop] = into
        return gx, None, None, None, None


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of logits and what is computed from them, in a model of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
