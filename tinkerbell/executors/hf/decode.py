"""One step of decoding: the next-token logits of many sequences of many adapters, in one pass of the model.

A row's bits must not depend on its company. So rows come in tiles of TILE rows of one adapter, padded with idle
rows, and every GEMM has the shape of whole tiles. GEMMs run over neighbouring tiles at once, and attention over all
rows with slots of one size, if that gives each row the bits it has in a tile by itself, which is tried out on the
model before the first sample; otherwise they run tile by tile and row by row.

Shapes: T rows of a pass (a multiple of TILE), V vocabulary.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tinkerbell.executors.hf.adapter import Adapter
from tinkerbell.executors.hf.kv_cache import Cache, DecodeAttention, Prefix, Store
from tinkerbell.executors.hf.runtime import Pass, RowRange, Runtime
from tinkerbell.types import LoraConfig

TILE = 4
MAX_ROWS = 64
"""T of one pass: more rows gain little on a CPU and hold back those that would finish early."""

TRIAL_TILES = ((0, 1, 1, 1, 2, 0, 0), (2, 1, 1, 1, 0, 2, 2, 2, 0, 0, 0, 1, 1, 1, 2, 2))
"""Passes that are compared with single tiles: which of the trial adapters each tile belongs to."""
TRIAL_RANKS = (5, 16)
"""Of trial adapters 0 and 1; 2 is the base model."""
TRIAL_TOKENS = 100
"""Tokens before those of a trial, at most: two sizes of slots."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence that is to be continued by one token."""

    adapter: Adapter | None
    token: int
    """Its last one so far; the tokens before are in the cache."""
    cache: Cache


class Decoder:
    """Decoding on one runtime."""

    @torch.inference_mode()
    def __init__(self, runtime: Runtime) -> None:
        """Tries out whether tiles can share a GEMM: six passes of one token."""
        self._runtime = runtime
        self.fused = True
        """Whether products run over all the rows they concern at once."""
        probe = Store().open(Prefix(0))
        self.step([Row(None, 0, probe)])
        self.token_bytes = probe.token_bytes()
        """Of the keys and values of one token."""
        self._trial_layers = [layer[:, 0] for layer in probe.pool.layers]
        tiles = self._trial_tiles()
        # Each row with a store of its own: attention is alone, too.
        alone = [
            self.step([replace(row, cache=Store().open(self._trial_prefix(row.token))) for row in tile])
            for tile in tiles
        ]
        if runtime.device.type == "cpu":
            self.fused = all(self._same_bits(tiles, alone, numbers) for numbers in TRIAL_TILES)
            if not self.fused:
                log.warning("sampling runs one GEMM for each %d rows: fused ones change bits on this CPU", TILE)

    def _trial_tiles(self) -> list[list[Row]]:
        """A tile of each trial adapter, its rows being different tokens."""
        adapters = [*(_trial_adapter(self._runtime, rank) for rank in TRIAL_RANKS), None]
        vocab_size = self._runtime.head.out_features
        unused = Store().open(Prefix(0))
        return [
            [Row(adapter, (TILE * number + i) % vocab_size, unused) for i in range(TILE)]
            for number, adapter in enumerate(adapters)
        ]

    def _trial_prefix(self, token: int) -> Prefix:
        """Noise before a token, of a length of its own."""
        prefix = Prefix(1 + 11 * token % TRIAL_TOKENS)
        noise = torch.Generator().manual_seed(token)
        for layer in self._trial_layers:
            shape = (2, layer.shape[1], prefix.length, layer.shape[3])
            prefix.layers.append(torch.randn(shape, generator=noise).to(layer))
        return prefix

    def _same_bits(self, tiles: list[list[Row]], alone: list[list[Tensor]], numbers: Sequence[int]) -> bool:
        """Whether tiles have in one pass the logits they have alone, wherever they and their rows stand."""
        rows: list[Row] = []
        expected: list[Tensor] = []
        store = Store()
        for place, number in enumerate(numbers):
            for i in range(TILE):
                turned = (i + place) % TILE
                row = tiles[number][turned]
                rows.append(replace(row, cache=store.open(self._trial_prefix(row.token))))
                expected.append(alone[number][turned])
        found = self.step(rows)
        return all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[Tensor]:
        """[V] logits in main memory for each of the rows, in order; their tokens are added to the caches."""
        logits: dict[int, Tensor] = {}
        for tiles in _passes(rows):
            indices = [index for tile in tiles for index in tile]
            found = self._pass([None if index is None else rows[index] for index in indices])
            logits |= {index: found[row] for row, index in enumerate(indices) if index is not None}
        return [logits[index] for index in range(len(rows))]

    def _pass(self, rows: Sequence[Row | None]) -> Tensor:
        """[T, V] in fp32 or fp64; rows are whole tiles, None being idle."""
        device = self._runtime.device
        attention = DecodeAttention([None if row is None else row.cache for row in rows], device, together=self.fused)
        plan = Pass(
            bounds=(0, len(rows)) if self.fused else tuple(range(0, len(rows) + 1, TILE)),
            ranges=tuple(self._ranges(rows)),
            attention=attention,
            few_rows=True,
        )
        tokens = torch.tensor([0 if row is None else row.token for row in rows], device=device)
        positions = torch.tensor([0 if row is None else row.cache.length for row in rows], device=device)
        logits = self._runtime.logits(self._runtime.hidden(tokens, positions, plan), plan)
        attention.advance()
        # The choice is made on the CPU, where cumulative sums have one order.
        return logits.cpu() if logits.dtype == torch.float64 else logits.float().cpu()

    def _ranges(self, rows: Sequence[Row | None]) -> list[RowRange]:
        """Of the tiles' adapters; neighbouring tiles of one adapter are one range where GEMMs are fused."""
        ranges: list[RowRange] = []
        for start in range(0, len(rows), TILE):
            first = rows[start]
            assert first is not None, "a tile begins with a row that is not idle"
            if first.adapter is None:
                continue
            begin = start
            if self.fused and ranges and ranges[-1].stop == start and ranges[-1].adapter is first.adapter:
                begin = ranges.pop().start
            ranges.append(RowRange(begin, start + TILE, first.adapter))
        return ranges


def _passes(rows: Sequence[Row]) -> list[list[list[int | None]]]:
    """Indices of `rows` in tiles of one adapter each, adapters in order of appearance, in passes."""
    by_adapter: dict[int, list[int | None]] = {}
    for index, row in enumerate(rows):
        by_adapter.setdefault(id(row.adapter), []).append(index)
    tiles: list[list[int | None]] = []
    for indices in by_adapter.values():
        indices += [None] * (-len(indices) % TILE)
        tiles += [indices[start : start + TILE] for start in range(0, len(indices), TILE)]
    per_pass = MAX_ROWS // TILE
    return [tiles[start : start + per_pass] for start in range(0, len(tiles), per_pass)]


def _trial_adapter(runtime: Runtime, rank: int) -> Adapter:
    adapter = Adapter(LoraConfig(rank=rank), runtime.shapes, runtime.adapter_dtype, runtime.device)
    adapter.initialise(rank)
    for pair in adapter.weights.pairs.values():
        pair.B.copy_(pair.A.flatten()[0])
    return adapter
