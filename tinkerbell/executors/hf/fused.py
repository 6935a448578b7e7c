"""RMSNorm, SwiGLU and rotary embedding in fewer passes over memory than transformers' modules take, the same bits.

Only in fp32, and only where a trial on random numbers gives what the model's own code gives; all else stays as it is.

Bits are the same forward; gradients differ from autograd's by rounding.

Shapes: T rows of a pass, D hidden size, F intermediate size, H heads, S head size.
"""

import inspect
from collections.abc import Callable
from itertools import pairwise
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from tinkerbell.executors.hf.runtime import Pass, Runtime

ROTARY = "apply_rotary_pos_emb"
"""The function transformers' attention modules call by this name in their file."""

DEPRECATION = "transformers.utils.deprecation"


def fuse(decoder: nn.Module, runtime: Runtime) -> None:
    """Replace what can be replaced in `decoder`, module by module: other models of the process keep their own."""
    for module in decoder.modules():
        if type(module).__name__.endswith("RMSNorm"):
            _fuse_norm(module)
        elif type(module).__name__.endswith("MLP"):
            _fuse_gate(module, runtime)
        elif hasattr(module, "layer_idx"):
            _fuse_rotary(module)


class RMSNormFn(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019, arXiv 1910.07467); the weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., D], weight [D] -> [..., D]"""
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """gx = r (g w) - x r^3 mean(g w x), with r = 1 / sqrt(mean(x^2) + eps)."""
        x, scale, weight = ctx.saved_tensors
        g = grad_outputs[0] * weight
        inner = (g * x).mean(-1, keepdim=True).mul_(scale).mul_(scale).mul_(scale)
        return g.mul_(scale).sub_(x * inner), None, None


class SwiGLUFn(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, apart: tuple[int, ...]) -> Tensor:
        """gate and up [1, T, F] -> [1, T, F]; `apart`: as in `hooks.SplitRows`, see `Pass.vectors_apart`."""
        ctx.apart = apart
        ctx.save_for_backward(gate, up)
        return _silu(gate, apart).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """The activation is computed again rather than kept."""
        gate, up = ctx.saved_tensors
        g = grad_outputs[0]
        g_gate = g * up
        for start, stop in pairwise(ctx.apart):
            part = g_gate[:, start:stop]
            torch.ops.aten.silu_backward.grad_input(part, gate[:, start:stop], grad_input=part)
        return g_gate, _silu(gate, ctx.apart).mul_(g), None


def _silu(x: Tensor, apart: tuple[int, ...]) -> Tensor:
    y = torch.empty_like(x)
    for start, stop in pairwise(apart):
        torch.ops.aten.silu.out(x[:, start:stop], out=y[:, start:stop])
    return y


class RotaryFn(torch.autograd.Function):
    """x cos + rotate_half(x) sin (Su et al. 2021, arXiv 2104.09864), halves of a head being the two coordinates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [1, H, T, S] as projections leave it (rows side by side), cos and sin [1, T, S] -> the same layout."""
        ctx.save_for_backward(cos, sin)
        x, cos, sin = x.transpose(1, 2), cos.unsqueeze(2), sin.unsqueeze(2)
        half = x.shape[-1] // 2
        y = x * cos
        y[..., :half] -= x[..., half:] * sin[..., :half]
        y[..., half:] += x[..., :half] * sin[..., half:]
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """The transpose of the rotation."""
        cos, sin = (table.unsqueeze(2) for table in ctx.saved_tensors)
        g = grad_outputs[0].transpose(1, 2)
        half = g.shape[-1] // 2
        gx = g * cos
        gx[..., :half] += g[..., half:] * sin[..., half:]
        gx[..., half:] -= g[..., :half] * sin[..., :half]
        return gx.transpose(1, 2), None, None


def _fuse_norm(module: nn.Module) -> None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or weight.dtype != torch.float32:
        return
    own: Callable[[Tensor], Tensor] = module.forward
    trial = _random(4, weight.shape[0], like=weight)
    expected = own(trial)
    # The Gemma family keeps its weights less one.
    for scale in (weight.detach(), weight.detach() + 1.0):
        if torch.equal(RMSNormFn.apply(trial, scale, eps), expected):  # type: ignore[no-untyped-call]
            module.forward = _norm(scale, eps)
            return


def _norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    apply: Callable[..., Tensor] = RMSNormFn.apply
    return lambda x: apply(x, weight, eps)


def _fuse_gate(module: nn.Module, runtime: Runtime) -> None:
    own: Callable[[Tensor], Tensor] = module.forward
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    weight = getattr(layers[0], "weight", None)
    if None in layers or len(list(module.children())) != 4 or weight is None or weight.dtype != torch.float32:
        return
    gate, up, down = (cast("nn.Module", layer) for layer in layers)
    apply: Callable[..., Tensor] = SwiGLUFn.apply

    def forward(x: Tensor) -> Tensor:
        y: Tensor = down(apply(gate(x), up(x), runtime.current.vectors_apart(weight.shape[0])))
        return y

    trial = _random(1, 4, weight.shape[1], like=weight)
    with torch.no_grad(), runtime.running(Pass((0, 4))):
        if torch.equal(forward(trial), own(trial)):
            module.forward = forward


def _fuse_rotary(module: nn.Module) -> None:
    forward = _without_renaming(type(module).forward)
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return
    own = forward.__globals__.get(ROTARY)
    weight = next(module.parameters(), None)
    if own is None or weight is None or weight.dtype != torch.float32:
        return
    if list(inspect.signature(own).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return
    queries, keys = (_random(1, 3, heads, 8, like=weight).transpose(1, 2) for heads in (4, 2))
    cos, sin = _random(1, 3, 8, like=weight), _random(1, 3, 8, like=weight)
    rotate = _rotate(own)
    if not all(map(torch.equal, own(queries, keys, cos, sin), rotate(queries, keys, cos, sin))):
        return
    ours = FunctionType(
        forward.__code__, {**forward.__globals__, ROTARY: rotate}, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    ours.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(ours, module)


def _without_renaming(function: Any) -> Any:
    """What is behind transformers' wrappers that take an argument under its former name, too; nobody here uses one."""
    while isinstance(function, FunctionType) and function.__globals__.get("__name__") == DEPRECATION:
        function = vars(function)["__wrapped__"]
    return function


def _rotate(own: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    apply: Callable[..., Tensor] = RotaryFn.apply

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim != 1 or not q.shape[-1] == k.shape[-1] == cos.shape[-1]:
            # Such as rotation of a part of each head.
            return own(q, k, cos, sin, unsqueeze_dim)
        return apply(q, cos, sin), apply(k, cos, sin)

    return rotate


def _random(*shape: int, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(like)
