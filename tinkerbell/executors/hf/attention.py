"""Attention over packed sequences, plugged into transformers' attention registry.

Shapes: T rows of a pass, H query heads, K key/value heads (H divisible by K), D head size.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tinkerbell.errors import InvalidRequest

if TYPE_CHECKING:
    from tinkerbell.executors.hf.runtime import Runtime

NAME = "tinkerbell_packed"
"""Key in transformers' AttentionInterface; the model's own `runtime` is found through its modules."""


class AttentionBackend(Protocol):
    """What a pass does where the model attends."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [1, H, T, D], key and value [1, K, T, D], after rotary embedding -> [1, T, H, D].

        `layer` counts from 0. Row t of the result may depend on rows of t's own sequence only.
        """
        ...


class PackedAttention(AttentionBackend, Protocol):
    """One over sequences that lie one after another in the rows of a pass."""

    def fill(self, num_rows: int) -> None:
        """So many rows of no one follow the last sequence."""
        ...


class PackedCausal:
    """Causal attention within each of the sequences that lie one after another in the rows of a pass."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """`lengths`: tokens of each sequence, in row order; their sum is T."""
        self.lengths = list(lengths)
        self._offsets: Tensor | None = None

    def fill(self, num_rows: int) -> None:
        """See PackedAttention."""
        self.lengths.append(num_rows)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See AttentionBackend. On CUDA one varlen kernel; that branch has never been run."""
        if query.is_cuda:
            return self._varlen(query, key, value, scale)
        grouped = query.shape[1] != key.shape[1]
        split: Callable[..., tuple[Tensor, ...]] = _Split.apply
        fresh: Callable[[Tensor], Tensor] = _Aligned.apply
        parts = zip(*(split(x, self.lengths) for x in (query, key, value)), strict=True)
        outputs = [
            scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped) for q, k, v in parts
        ]
        return torch.cat([fresh(output.transpose(1, 2)) for output in outputs], 1)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if self._offsets is None:
            ends = torch.tensor([0, *self.lengths]).cumsum(0)
            self._offsets = ends.to(device=query.device, dtype=torch.int32)
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
        longest = max(self.lengths)
        out = varlen_attn(
            q, k, v, self._offsets, self._offsets, longest, longest,
            scale=scale, window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out[None]


class _Split(torch.autograd.Function):
    """x [1, H, T, D] -> each sequence's rows, laid out and aligned as they are when the sequence is alone.

    Rows of x are expected side by side in memory, [T, H, D], as projections leave them; the gradient has that layout.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
        ctx.lengths, ctx.shape = lengths, x.shape
        rows = x.transpose(1, 2).contiguous()
        return tuple(_aligned(part).transpose(1, 2) for part in torch.split(rows, lengths, 1))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        _, heads, length, size = ctx.shape
        gradient = grad_outputs[0].new_empty(1, length, heads, size)
        for into, part in zip(torch.split(gradient, ctx.lengths, 1), grad_outputs, strict=True):
            into.copy_(part.transpose(1, 2))
        return gradient.transpose(1, 2), None


class _Aligned(torch.autograd.Function):
    """The identity; the gradient comes as if there were nothing else in the tensor it is part of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return _aligned(grad_outputs[0])


def _aligned(part: Tensor) -> Tensor:
    """`part` [1, L, H, D], copied unless its rows lie side by side from a 64-byte boundary on: its address and strides
    tell how much company it has, and a kernel may round otherwise for another alignment."""
    if part.is_contiguous() and part.data_ptr() % 64 == 0:
        return part
    return part.clone(memory_format=torch.contiguous_format)


def register() -> None:
    """Make `NAME` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The backend knows the sequences, so no mask is ever built."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: hands over to the backend of the pass in flight."""
    runtime: Runtime = module.tinkerbell_runtime  # type: ignore[assignment]
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise InvalidRequest(f"attention with `{name}` is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    return runtime.current.attention.attend(layer, query, key, value, scale), None
