"""One step of decoding: the next-token logits of many sequences of many adapters, in one pass of the model.

A row's bits must not depend on its company. So rows come in tiles of TILE rows of one adapter, padded with idle
rows, and every GEMM has the shape of whole tiles. GEMMs run over neighbouring tiles at once if that gives each row
the bits it has in a tile by itself, which is tried out on the model when the server starts; otherwise they run
tile by tile.

Shapes: T rows of a pass (a multiple of TILE), V vocabulary.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinkerbell.executors.hf.adapter import Adapter
from tinkerbell.executors.hf.kv_cache import Cache, DecodeAttention, Prefix
from tinkerbell.executors.hf.runtime import Pass, RowRange, Runtime
from tinkerbell.types import LoraConfig

TILE = 4
MAX_ROWS = 64
"""T of one pass: more rows gain little on a CPU and hold back those that would finish early."""

TRIAL_ROWS = (2 * TILE, 7 * TILE, MAX_ROWS)
TRIAL_RANKS = (5, 16)

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

    def __init__(self, runtime: Runtime) -> None:
        """Tries out whether tiles can share a GEMM."""
        self._runtime = runtime
        self.fused = True
        """Whether a GEMM runs over all tiles it concerns at once."""
        trial = Row(None, 0, Cache(Prefix(0)))
        self.step([trial])
        self.token_bytes = trial.cache.token_bytes()
        """Of the keys and values of one token."""
        if runtime.device.type == "cpu":
            self.fused = self._tiles_keep_their_bits()
            if not self.fused:
                log.warning("sampling runs one GEMM for each %d rows: fused ones change bits on this CPU", TILE)

    @torch.no_grad()
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
        attention = DecodeAttention([None if row is None else row.cache for row in rows])
        plan = Pass(
            bounds=(0, len(rows)) if self.fused else tuple(range(0, len(rows) + 1, TILE)),
            ranges=tuple(self._ranges(rows)),
            attention=attention,
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

    def _tiles_keep_their_bits(self) -> bool:
        """Whether rows have the same logits in a tile by itself and among other tiles, on this machine."""
        adapters = [_trial_adapter(self._runtime, rank) for rank in TRIAL_RANKS]

        def row(number: int) -> Row:
            adapter = (*adapters, None)[number // TILE]
            return Row(adapter, number % self._runtime.head.out_features, Cache(Prefix(0)))

        alone: list[Tensor] = []
        for start in range(0, 3 * TILE, TILE):
            alone += self.step([row(start + i) for i in range(TILE)])
        for count in TRIAL_ROWS:
            numbers = [(3 * i + 1) % (3 * TILE) if i < TILE else i % (3 * TILE) for i in range(count)]
            found = self.step([row(number) for number in numbers])
            if not all(torch.equal(alone[number], logits) for number, logits in zip(numbers, found, strict=True)):
                return False
        return True


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
