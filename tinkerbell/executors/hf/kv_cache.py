"""Keys and values of sequences that are being continued, and the attention that fills and reads them.

Shapes: T rows of a pass, H query heads, K key/value heads, D head size, N tokens in a sequence's cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tinkerbell.executors.hf.attention import PackedCausal

BLOCK_TOKENS = 64
"""Caches begin with room for so many tokens beyond the prompt and double when they are full."""


class Cache:
    """Keys and values of one sequence, a tensor [2, K, capacity, D] for each layer.

    Its layout depends on the sequence alone, so attention over it has the same bits in any company.
    """

    def __init__(self, prefix: "Prefix") -> None:
        """Starts with a copy of the prompt's."""
        self.length = prefix.length
        """Tokens cached in every layer."""
        self._capacity = self.length + BLOCK_TOKENS
        self._layers: list[Tensor] = [self._roomy(layer) for layer in prefix.layers]

    def _roomy(self, layer: Tensor) -> Tensor:
        heads, size = layer.shape[1], layer.shape[3]
        room = layer.new_empty(2, heads, self._capacity, size)
        room[:, :, : self.length] = layer[:, :, : self.length]
        return room

    def make_room(self) -> None:
        """For one more token."""
        if self.length == self._capacity:
            self._capacity *= 2
            self._layers = [self._roomy(layer) for layer in self._layers]

    def token_bytes(self) -> int:
        """Of one token in all layers, once one was appended."""
        return sum(layer.element_size() * 2 * layer.shape[1] * layer.shape[3] for layer in self._layers)

    def append(self, layer: int, column: Tensor) -> Tensor:
        """Put key and value [2, K, D] of token `length` in place; returns [2, K, length + 1, D]."""
        if layer == len(self._layers):
            # A prompt of one token has no prefix to copy the shape from.
            self._layers.append(column.new_empty(2, column.shape[1], self._capacity, column.shape[2]))
        cache = self._layers[layer]
        cache[:, :, self.length] = column
        return cache[:, :, : self.length + 1]


class Prefix:
    """Keys and values of a prompt without its last token, [2, K, N, D] for each layer."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.layers: list[Tensor] = []


class PrefillAttention:
    """Causal attention over packed prompts that also keeps their keys and values."""

    def __init__(self, prefixes: Sequence[Prefix]) -> None:
        """In row order; their lengths sum to T."""
        self._prefixes = prefixes
        self._packed = PackedCausal([prefix.length for prefix in prefixes])

    def fill(self, num_rows: int) -> None:
        """See attention.PackedAttention."""
        self._packed.fill(num_rows)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See attention.AttentionBackend."""
        start = 0
        for prefix in self._prefixes:
            assert len(prefix.layers) == layer
            stop = start + prefix.length
            prefix.layers.append(torch.stack((key[0, :, start:stop], value[0, :, start:stop])))
            start = stop
        return self._packed.attend(layer, query, key, value, scale)


class DecodeAttention:
    """Each row is the next token of its own sequence and attends to that sequence's cache."""

    def __init__(self, caches: Sequence[Cache | None]) -> None:
        """One for each row; a row without a cache is padding and attends to nothing."""
        self._rows = [(row, cache) for row, cache in enumerate(caches) if cache is not None]
        for _, cache in self._rows:
            cache.make_room()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See attention.AttentionBackend."""
        grouped = query.shape[1] != key.shape[1]
        # Rows first, so that no stride of a row's operands tells how many others there are.
        queries = query[0].transpose(0, 1).contiguous()
        columns = torch.stack((key[0].transpose(0, 1), value[0].transpose(0, 1)), 1)
        out = torch.zeros_like(queries)
        for row, cache in self._rows:
            keys, values = cache.append(layer, columns[row]).unsqueeze(1).unbind(0)
            attended = scaled_dot_product_attention(
                queries[row][None, :, None], keys, values, scale=scale, enable_gqa=grouped
            )
            out[row] = attended[0, :, 0]
        return out[None]

    def advance(self) -> None:
        """After the pass: the rows' tokens are part of their sequences."""
        for _, cache in self._rows:
            cache.length += 1
