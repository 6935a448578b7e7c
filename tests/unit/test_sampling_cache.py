"""Pools of caches: sequences come, grow, move and go, and each row's attention has the bits it has alone."""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.support.rounding import CLOSE
from tinkerbell.executors.hf.kv_cache import BLOCK_TOKENS, Cache, DecodeAttention, Prefix, Store, slot_tokens

LAYERS = 2


class Sequence:
    """Its own queries, keys and values, and all that attention should have seen."""

    def __init__(self, seed: int, length: int, kv_heads: int, groups: int, size: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape = (kv_heads, groups, size)
        self.prefix = Prefix(length)
        self.prefix.layers = [self.noise(2, kv_heads, length, size) for _ in range(LAYERS if length else 0)]
        self.seen = [self.noise(2, kv_heads, 0, size) for _ in range(LAYERS)] if not length else self.prefix.layers[:]

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)


def run(sequences: list[Sequence], ends: list[int], store: Store) -> list[list[torch.Tensor]]:
    """Attention of each in each step and layer, the sequences ending after `ends` steps; checked against sdpa."""
    caches: dict[int, Cache] = {number: store.open(each.prefix) for number, each in enumerate(sequences)}
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    while caches:
        numbers = list(caches)
        attention = DecodeAttention([*(caches[number] for number in numbers), None], torch.device("cpu"))
        for layer in range(LAYERS):
            kv_heads, groups, size = sequences[0].shape
            queries, columns = [], []
            for number in numbers:
                queries.append(sequences[number].noise(kv_heads * groups, size))
                columns.append(sequences[number].noise(2, kv_heads, size))
            idle = torch.full((kv_heads * groups, size), float("nan"))
            query = torch.stack([*queries, idle], 1)[None]
            kv = torch.stack([*columns, idle[:kv_heads].expand(2, -1, -1)], 2)
            out = attention.attend(layer, query, kv[:1], kv[1:], 0.3)
            for row, number in enumerate(numbers):
                each = sequences[number]
                each.seen[layer] = torch.cat((each.seen[layer], columns[row][:, :, None]), 2)
                keys, values = each.seen[layer][:, None].unbind(0)
                expected = scaled_dot_product_attention(
                    queries[row][None, :, None], keys, values, scale=0.3, enable_gqa=True
                )
                torch.testing.assert_close(out[0, row], expected[0, :, 0], atol=CLOSE, rtol=CLOSE)
                found[number].append(out[0, row].clone())
        attention.advance()
        for number in numbers:
            if len(found[number]) == LAYERS * ends[number]:
                caches.pop(number).close()
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(3, 3, 64), (2, 1, 16), (1, 2, 18)])
def test_a_row_has_the_bits_it_has_alone(shape: tuple[int, int, int], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        draw = random.Random(0)
        lengths = [0, 1, 62, 63, 64, 65, 127, 511, *(draw.randrange(200) for _ in range(9))]
        ends = [draw.randint(1, 6) for _ in lengths]
        store = Store()
        together = run([Sequence(n, length, *shape) for n, length in enumerate(lengths)], ends, store)
        assert not store._pools, "a sequence that has ended leaves nothing"
        for n, length in enumerate(lengths):
            (alone,) = run([Sequence(n, length, *shape)], [ends[n]], Store())
            assert all(torch.equal(a, b) for a, b in zip(alone, together[n], strict=True)), f"{length} tokens"
    finally:
        torch.set_num_threads(before)


def test_what_another_sequence_left_does_not_show() -> None:
    """NaN behind a sequence's last token would reach it through a product with zero."""
    store = Store()
    bad, stays = store.open(Sequence(1, 20, 1, 1, 16).prefix), store.open(Sequence(2, 20, 1, 1, 16).prefix)
    for layer in bad.pool.layers:
        layer[:, bad.slot] = float("nan")
    bad.close()
    (alone,) = run([Sequence(3, 5, 1, 1, 16)], [3], Store())
    (found,) = run([Sequence(3, 5, 1, 1, 16)], [3], store)
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    assert stays.pool.members == [stays]


def test_slots_are_hardly_larger_than_what_they_hold() -> None:
    for length in range(1, 5000):
        assert length <= slot_tokens(length) <= max(length + BLOCK_TOKENS, 1.26 * length)
