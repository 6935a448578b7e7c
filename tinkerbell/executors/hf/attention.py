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


class PackedCausal:
    """Causal attention within each of the sequences that lie one after another in the rows of a pass."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """`lengths`: tokens of each sequence, in row order; their sum is T."""
        self.lengths = list(lengths)
        self._offsets: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See AttentionBackend. On CUDA one varlen kernel; that branch has never been run."""
        if query.is_cuda:
            return self._varlen(query, key, value, scale)
        grouped = query.shape[1] != key.shape[1]
        fresh: Callable[[Tensor], Tensor] = _Fresh.apply
        # `split` rather than slices: its backward is one concatenation, a slice's is a full-size zero tensor each.
        parts = zip(*(torch.split(x, self.lengths, 2) for x in (query, key, value)), strict=True)
        outputs = [
            fresh(
                scaled_dot_product_attention(
                    fresh(q), fresh(k), fresh(v), is_causal=True, scale=scale, enable_gqa=grouped
                )
            ).transpose(1, 2)
            for q, k, v in parts
        ]
        return torch.cat(outputs, 1)

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


class _Fresh(torch.autograd.Function):
    """A copy of its own in both directions: a slice's address and strides tell how much company it has, and a
    kernel may round otherwise for another alignment."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0].clone(memory_format=torch.contiguous_format)


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
