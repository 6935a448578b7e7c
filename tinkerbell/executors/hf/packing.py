"""Lays micro-batches of many adapters one after another, without padding, in packs of bounded size.

Shapes: N tokens of one micro-batch, K targets of each, T rows of a pack.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tinkerbell.errors import InvalidRequest
from tinkerbell.executors.hf.adapter import Adapter, Buffer
from tinkerbell.executors.hf.attention import PackedAttention, PackedCausal
from tinkerbell.executors.hf.gemm import GRAIN, TALLEST, Heights, filled
from tinkerbell.executors.hf.runtime import Pass, RowRange
from tinkerbell.executors.port import ForwardBackward
from tinkerbell.losses.registry import Loss, resolve
from tinkerbell.types import Datum, ModelInfo

PACK_TOKENS = TALLEST
"""Weights are read from memory once a pack, and a pack of so many rows is still one product. With twice as many tokens
a pass is hardly faster on a CPU, and its activations are twice as large."""

GRADIENT_BYTES = 512 * 1024**2
"""Of the micro-batches of one pack, unless the first alone has more: each has a buffer of its adapter's size."""


@dataclass(slots=True)
class MicroBatch:
    """One ForwardBackward unit as tensors: the smallest thing whose bits are promised."""

    unit: ForwardBackward
    adapter: Adapter
    loss: Loss
    tokens: Tensor
    """[N] int64"""
    targets: Tensor
    """[N, K] int64"""
    positions: Tensor
    """[N] int64, from 0 in every datum."""
    inputs: dict[str, Tensor]
    """Loss inputs, name -> [N K] float32."""
    lengths: list[int]
    """Tokens of each datum."""
    gradient: Buffer | None = field(default=None)
    """Where backward writes; of this micro-batch alone."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """K."""
        return self.targets.shape[1]

    @property
    def gradient_bytes(self) -> int:
        """Of the buffer it needs; 0 without a backward pass."""
        return self.adapter.weights.flat.nbytes if self.unit.backward else 0


def micro_batch(unit: ForwardBackward, adapter: Adapter, info: ModelInfo, device: torch.device) -> MicroBatch:
    """Check a unit against the model and its loss. Raises InvalidRequest naming the datum."""
    loss = resolve(unit.loss)
    if not unit.data:
        raise InvalidRequest("there is no datum in this request")
    if unit.outputs is not None and unit.outputs.top_k > info.vocab_size:
        raise InvalidRequest(f"top_k of {unit.outputs.top_k}; this model has {info.vocab_size} tokens")
    for index, datum in enumerate(unit.data):
        _check(index, datum, loss, info)
    names = sorted({name for datum in unit.data for name in datum.loss_inputs})
    if len({len(datum.targets) // len(datum.tokens) for datum in unit.data}) > 1:
        raise InvalidRequest("all data of one request must have as many targets for a token")
    lengths = [datum.num_tokens for datum in unit.data]
    return MicroBatch(
        unit=unit,
        adapter=adapter,
        loss=loss,
        tokens=_tensor([datum.tokens for datum in unit.data], "<i4", device).long(),
        targets=_tensor([datum.targets for datum in unit.data], "<i4", device).long().view(sum(lengths), -1),
        positions=torch.cat([torch.arange(length, device=device) for length in lengths]),
        inputs={name: _tensor([loss.signature.input_of(d, name) for d in unit.data], "<f4", device) for name in names},
        lengths=lengths,
    )


def _tensor(parts: list[bytes], dtype: str, device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(parts), dtype=dtype).copy()).to(device)


def _check(index: int, datum: Datum, loss: Loss, info: ModelInfo) -> None:
    n = datum.num_tokens
    if n == 0 or len(datum.tokens) != 4 * n:
        raise InvalidRequest(f"data[{index}]: tokens must be int32, at least one")
    if n > info.max_length:
        raise InvalidRequest(f"data[{index}]: {n} tokens; this model takes at most {info.max_length}")
    num_targets, rest = divmod(len(datum.targets), 4 * n)
    if rest or num_targets < 1 or (num_targets > 1 and not loss.signature.several_targets):
        raise InvalidRequest(f"data[{index}]: {n} tokens but {len(datum.targets) / 4:g} targets")
    for name, ids in (("tokens", datum.tokens), ("targets", datum.targets)):
        check_token_ids(f"data[{index}].{name}", ids, info)
    missing = sorted(set(loss.signature.required) - set(datum.loss_inputs))
    if missing:
        raise InvalidRequest(f"data[{index}]: the loss needs `{missing[0]}` in loss_inputs")
    unknown = sorted(set(datum.loss_inputs).difference(loss.signature.required, loss.signature.optional))
    if unknown:
        raise InvalidRequest(f"data[{index}]: the loss does not read `{unknown[0]}`")
    for name, array in datum.loss_inputs.items():
        if len(array) != len(datum.targets):
            raise InvalidRequest(
                f"data[{index}]: {len(datum.targets) // 4} targets but {len(array) / 4:g} numbers in `{name}`"
            )


def check_token_ids(where: str, ids: bytes, info: ModelInfo) -> None:
    """Raises InvalidRequest unless every int32 of `ids` is a token of the model."""
    array = np.frombuffer(ids, dtype="<i4")
    bad = array[(array < 0) | (array >= info.vocab_size)]
    if bad.size:
        raise InvalidRequest(f"{where}: token {int(bad[0])} is outside the vocabulary of {info.vocab_size}")


def packs(
    batches: Sequence[MicroBatch], max_tokens: int = PACK_TOKENS, gradient_bytes: int = GRADIENT_BYTES
) -> list[list[MicroBatch]]:
    """Cut into the fewest packs of whole micro-batches in order, each with at most so many tokens and bytes of
    gradients; a larger one is alone. Packs come out about even: products of a short rest run at a poor rate."""
    fewest = _filled_one_by_one(batches, max_tokens, gradient_bytes)
    if len(fewest) > 1:
        even = -(-sum(batch.num_tokens for batch in batches) // len(fewest))
        for limit in range(even, max_tokens, GRAIN):
            found = _filled_one_by_one(batches, limit, gradient_bytes)
            if len(found) == len(fewest):
                return found
    return fewest


def _filled_one_by_one(batches: Sequence[MicroBatch], max_tokens: int, gradient_bytes: int) -> list[list[MicroBatch]]:
    found: list[list[MicroBatch]] = []
    tokens = size = 0
    for batch in batches:
        tokens, size = tokens + batch.num_tokens, size + batch.gradient_bytes
        if not found or tokens > max_tokens or size > gradient_bytes:
            found.append([])
            tokens, size = batch.num_tokens, batch.gradient_bytes
        found[-1].append(batch)
    return found


Products = Literal["shared", "split", "whole"]
"""How the base products of a pass run. shared: over rows of several micro-batches, in heights that keep bits (see
`gemm`); split: one for each micro-batch; whole: one for all, whatever it does to bits."""


def plan(pack: Sequence[MicroBatch], products: Products, heights: Heights) -> Pass:
    """The pass over the rows of `pack`, in order."""
    bounds = [0]
    ranges: list[RowRange] = []
    lengths: list[int] = []
    for batch in pack:
        start, stop = bounds[-1], bounds[-1] + batch.num_tokens
        ranges.append(RowRange(start, stop, batch.adapter, batch.gradient))
        bounds.append(stop)
        lengths += batch.lengths
    return arrange(bounds, ranges, PackedCausal(lengths), products, heights)


def arrange(
    bounds: Sequence[int], ranges: Sequence[RowRange], attention: PackedAttention, products: Products, heights: Heights
) -> Pass:
    """The pass over micro-batches with these bounds; where products are shared, rows of no one fill it up."""
    apart = tuple(bounds)
    if products == "split":
        return Pass(apart, tuple(ranges), attention)
    if products == "whole":
        return Pass((0, apart[-1]), tuple(ranges), attention, apart)
    num_rows = filled(apart[-1])
    if num_rows > apart[-1]:
        attention.fill(num_rows - apart[-1])
        apart = (*apart, num_rows)
    return Pass(heights.cuts(num_rows), tuple(ranges), attention, apart, heights)


def column(parts: Sequence[Tensor], num_rows: int) -> Tensor:
    """[num_rows] int64: `parts` [N] one after another, then zeros."""
    joined = torch.cat(list(parts))
    return torch.nn.functional.pad(joined, (0, num_rows - len(joined)))
