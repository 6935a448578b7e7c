"""Keys and values of sequences that are being continued, and the attention that fills and reads them.

Sequences lie side by side in pools, so that one product serves all of a pool. How many tokens a pool's slots hold is
a function of a sequence's length alone, and what lies behind its last token is finite and masked: attention over a
sequence has the same operands in any company.

Shapes: T rows of a pass, H query heads, K key/value heads, D head size, N tokens in a sequence's cache, S slots of a
pool, C tokens a slot holds, n rows of a pass whose sequences share a pool.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinkerbell.executors.hf.attention import PackedCausal

BLOCK_TOKENS = 64
"""The least C: a whole number of vector registers, so that no kernel treats the last tokens differently."""
BLOCKS = 8
"""C is at most so many blocks, which double for longer sequences: few pools, and little of a long slot lies idle."""


def slot_tokens(length: int) -> int:
    """C of the pool for so many tokens."""
    block = BLOCK_TOKENS
    while block * BLOCKS < length:
        block *= 2
    return -(-length // block) * block


class Prefix:
    """Keys and values of a prompt without its last token, [2, K, N, D] for each layer."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.layers: list[Tensor] = []


class Cache:
    """Keys and values of one sequence: a slot of a pool."""

    def __init__(self, store: "Store", length: int) -> None:
        """Made by Store.open."""
        self._store = store
        self.length = length
        """Tokens cached in every layer."""
        self.pool = Pool(0)
        self.slot = 0

    def make_room(self) -> None:
        """For one more token: a sequence that fills its slot moves to a larger one."""
        if self.length == self.pool.capacity:
            self._store.move(self)

    def close(self) -> None:
        """Give the slot back."""
        self._store.remove(self)

    def token_bytes(self) -> int:
        """Of one token in all layers, once one was appended."""
        return sum(layer.element_size() * 2 * layer.shape[2] * layer.shape[4] for layer in self.pool.layers)


class Pool:
    """Slots of one capacity; those in use come first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        """C"""
        self.members: list[Cache] = []
        """By slot."""
        self.layers: list[Tensor] = []
        """[2, S, K, C, D] for each layer; zero where nothing was ever put."""
        self._slots = 0

    def add(self, member: Cache, layers: Sequence[Tensor]) -> None:
        """Take the next slot and copy [2, K, N, D] of each layer into it."""
        slot = len(self.members)
        if slot == self._slots:
            self._resize(max(1, 2 * slot))
        for number, layer in enumerate(layers):
            into = self.layer(number, layer)
            into[:, slot, :, : member.length] = layer
            # What another sequence has left there could be NaN, which no mask takes out of a product.
            into[:, slot, :, member.length :] = 0
        for into in self.layers[len(layers) :]:
            into[:, slot] = 0
        self.members.append(member)
        member.pool, member.slot = self, slot

    def remove(self, member: Cache) -> None:
        """The last member moves to the slot that becomes free."""
        last = self.members.pop()
        if last is not member:
            for layer in self.layers:
                layer[:, member.slot] = layer[:, last.slot]
            self.members[member.slot] = last
            last.slot = member.slot
        if 4 * len(self.members) <= self._slots:
            self._resize(self._slots // 2)

    def layer(self, number: int, like: Tensor) -> Tensor:
        """[2, S, K, C, D] of a layer, made when the first of its tokens comes; `like` is [2, K, any, D]."""
        if number == len(self.layers):
            self.layers.append(like.new_zeros(2, self._slots, like.shape[1], self.capacity, like.shape[3]))
        return self.layers[number]

    def _resize(self, slots: int) -> None:
        used = len(self.members)
        self._slots = slots
        for number, layer in enumerate(self.layers):
            resized = layer.new_zeros(2, slots, *layer.shape[2:])
            resized[:, :used] = layer[:, :used]
            self.layers[number] = resized


class Store:
    """The caches of sequences that are sampled together."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def open(self, prefix: Prefix) -> Cache:
        """A cache that starts with a copy of the prompt's."""
        cache = Cache(self, prefix.length)
        self._pool(prefix.length + 1).add(cache, prefix.layers)
        return cache

    def move(self, cache: Cache) -> None:
        """To a pool that has room for one more token."""
        pool, slot = cache.pool, cache.slot
        layers = [layer[:, slot, :, : cache.length].clone() for layer in pool.layers]
        self.remove(cache)
        self._pool(cache.length + 1).add(cache, layers)

    def remove(self, cache: Cache) -> None:
        """Give its slot back."""
        cache.pool.remove(cache)
        if not cache.pool.members:
            # Its memory is wanted elsewhere, by larger slots above all.
            del self._pools[cache.pool.capacity]

    def _pool(self, length: int) -> Pool:
        capacity = slot_tokens(length)
        return self._pools.setdefault(capacity, Pool(capacity))


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


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of a pass whose sequences lie in one pool."""

    rows: Tensor
    """[n] in the order of their slots."""
    pool: Pool
    first: int
    """Slot of the first row."""
    slots: Tensor
    """[n]"""
    adjacent: bool
    """Whether the slots follow one another."""
    lengths: Tensor
    """[n] tokens cached so far."""
    mask: Tensor
    """[n, 1, C]: 0 where there is a token or is about to be, minus infinity elsewhere."""


class DecodeAttention:
    """Each row is the next token of its own sequence and attends to that sequence's cache."""

    def __init__(self, caches: Sequence[Cache | None], device: torch.device, *, together: bool = True) -> None:
        """One for each row; a row without a cache is padding and attends to nothing.

        `together`: whether the rows of one pool share products.
        """
        self._rows = [(row, cache) for row, cache in enumerate(caches) if cache is not None]
        for _, cache in self._rows:
            cache.make_room()
        members: dict[tuple[int, int], list[tuple[int, Cache]]] = {}
        for row, cache in self._rows:
            members.setdefault((id(cache.pool), 0 if together else row), []).append((row, cache))
        self._groups = [_group(each, device) for each in members.values()]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See attention.AttentionBackend."""
        queries = query[0].transpose(0, 1)
        columns = torch.stack((key[0], value[0])).transpose(1, 2)
        out = queries.new_zeros(queries.shape)
        for group in self._groups:
            cache = group.pool.layer(layer, columns.transpose(1, 2))
            # [2, n, K, D], the place of each row's token.
            cache[:, group.slots, :, group.lengths] = columns[:, group.rows].transpose(0, 1)
            count = len(group.rows)
            if group.adjacent:
                keys, values = cache[:, group.first : group.first + count].unbind(0)
            else:
                keys, values = cache[:, group.slots].unbind(0)
            out[group.rows] = _attend(queries[group.rows], keys, values, group.mask, scale)
        return out[None]

    def advance(self) -> None:
        """After the pass: the rows' tokens are part of their sequences."""
        for _, cache in self._rows:
            cache.length += 1


def _group(members: list[tuple[int, Cache]], device: torch.device) -> _Group:
    members = sorted(members, key=lambda member: member[1].slot)
    pool, slots = members[0][1].pool, [cache.slot for _, cache in members]
    lengths = torch.tensor([cache.length for _, cache in members], device=device)
    hidden = torch.arange(pool.capacity, device=device)[None] > lengths[:, None]
    return _Group(
        rows=torch.tensor([row for row, _ in members], device=device),
        pool=pool,
        first=slots[0],
        slots=torch.tensor(slots, device=device),
        adjacent=slots[-1] - slots[0] == len(slots) - 1,
        lengths=lengths,
        mask=torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -math.inf)[:, None],
    )


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """queries [n, H, D], keys and values [n, K, C, D], mask [n, 1, C] -> [n, H, D]; the softmax in fp32 at least."""
    n, num_heads, size = queries.shape
    kv_heads, capacity = keys.shape[1:3]
    wide = torch.promote_types(queries.dtype, torch.float32)
    blocks = queries.reshape(n * kv_heads, num_heads // kv_heads, size)
    scores = torch.bmm(blocks, keys.reshape(n * kv_heads, capacity, size).transpose(1, 2)).to(wide).mul_(scale)
    scores.view(n, num_heads, capacity).add_(mask)
    weights = torch.softmax(scores, -1).to(values.dtype)
    return torch.bmm(weights, values.reshape(n * kv_heads, capacity, size)).view(n, num_heads, size)
