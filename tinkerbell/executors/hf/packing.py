"""Lays micro-batches of many adapters one after another, without padding, in packs of bounded size.

Shapes: N tokens of one micro-batch, T rows of a pack.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tinkerbell.errors import InvalidRequest
from tinkerbell.executors.hf.adapter import Adapter, Buffer
from tinkerbell.executors.hf.attention import PackedCausal
from tinkerbell.executors.hf.runtime import Pass, RowRange
from tinkerbell.executors.port import ForwardBackward
from tinkerbell.losses.registry import Loss, resolve
from tinkerbell.types import Datum, ModelInfo

PACK_TOKENS = 512
"""Larger packs are slower on a CPU (cache, page faults) and hold twice the activations."""

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
    """[N] int64"""
    positions: Tensor
    """[N] int64, from 0 in every datum."""
    inputs: dict[str, Tensor]
    """Loss inputs, name -> [N] float32."""
    lengths: list[int]
    """Tokens of each datum."""
    gradient: Buffer | None = field(default=None)
    """Where backward writes; of this micro-batch alone."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.tokens)

    @property
    def gradient_bytes(self) -> int:
        """Of the buffer it needs; 0 without a backward pass."""
        return self.adapter.weights.flat.nbytes if self.unit.backward else 0


def micro_batch(unit: ForwardBackward, adapter: Adapter, info: ModelInfo, device: torch.device) -> MicroBatch:
    """Check a unit against the model and its loss. Raises InvalidRequest naming the datum."""
    loss = resolve(unit.loss)
    if not unit.data:
        raise InvalidRequest("there is no datum in this request")
    for index, datum in enumerate(unit.data):
        _check(index, datum, loss, info)
    names = sorted(set(unit.data[0].loss_inputs))
    if any(sorted(datum.loss_inputs) != names for datum in unit.data):
        raise InvalidRequest("all data of one request must carry the same loss inputs")
    lengths = [datum.num_tokens for datum in unit.data]
    return MicroBatch(
        unit=unit,
        adapter=adapter,
        loss=loss,
        tokens=_tensor([datum.tokens for datum in unit.data], "<i4", device).long(),
        targets=_tensor([datum.targets for datum in unit.data], "<i4", device).long(),
        positions=torch.cat([torch.arange(length, device=device) for length in lengths]),
        inputs={name: _tensor([d.loss_inputs[name] for d in unit.data], "<f4", device) for name in names},
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
    if len(datum.targets) != 4 * n:
        raise InvalidRequest(f"data[{index}]: {n} tokens but {len(datum.targets) // 4} targets")
    for name, ids in (("tokens", datum.tokens), ("targets", datum.targets)):
        check_token_ids(f"data[{index}].{name}", ids, info)
    missing = sorted(loss.required - set(datum.loss_inputs))
    if missing:
        raise InvalidRequest(f"data[{index}]: the loss needs `{missing[0]}` in loss_inputs")
    unknown = sorted(set(datum.loss_inputs) - loss.required - loss.optional)
    if unknown:
        raise InvalidRequest(f"data[{index}]: the loss does not read `{unknown[0]}`")
    for name, array in datum.loss_inputs.items():
        if len(array) != 4 * n:
            raise InvalidRequest(f"data[{index}]: {n} tokens but {len(array) // 4} numbers in `{name}`")


def check_token_ids(where: str, ids: bytes, info: ModelInfo) -> None:
    """Raises InvalidRequest unless every int32 of `ids` is a token of the model."""
    array = np.frombuffer(ids, dtype="<i4")
    bad = array[(array < 0) | (array >= info.vocab_size)]
    if bad.size:
        raise InvalidRequest(f"{where}: token {int(bad[0])} is outside the vocabulary of {info.vocab_size}")


def packs(
    batches: Sequence[MicroBatch], max_tokens: int = PACK_TOKENS, gradient_bytes: int = GRADIENT_BYTES
) -> Iterator[list[MicroBatch]]:
    """Cut into packs of whole micro-batches, greedily in order, each with at most so many tokens and bytes of
    gradients; a larger one is alone."""
    pack: list[MicroBatch] = []
    tokens = size = 0
    for batch in batches:
        if pack and (tokens + batch.num_tokens > max_tokens or size + batch.gradient_bytes > gradient_bytes):
            yield pack
            pack, tokens, size = [], 0, 0
        pack.append(batch)
        tokens += batch.num_tokens
        size += batch.gradient_bytes
    if pack:
        yield pack


def plan(pack: Sequence[MicroBatch], *, exact: bool, head: str) -> tuple[Pass, Pass]:
    """The pass over the rows of `pack`, in order, through the decoder and through the layer named `head`.

    Exact: split where the micro-batches are. Otherwise whole, but for a head with LoRA on some of the rows.
    """
    bounds = [0]
    ranges: list[RowRange] = []
    lengths: list[int] = []
    for batch in pack:
        start, stop = bounds[-1], bounds[-1] + batch.num_tokens
        ranges.append(RowRange(start, stop, batch.adapter, batch.gradient))
        bounds.append(stop)
        lengths += batch.lengths
    split = Pass(bounds=tuple(bounds), ranges=tuple(ranges), attention=PackedCausal(lengths))
    if exact:
        return split, split
    whole = replace(split, bounds=(0, bounds[-1]), micro_batches=split.bounds)
    return whole, split if split.on(head) else whole
