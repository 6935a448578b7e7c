"""One adapter in memory: a flat buffer each for weights, gradient and the two Adam moments.

Shapes: R LoRA rank, I input features, O output features, P parameters of the adapter.
"""

import hashlib
import math
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tinkerbell.errors import InvalidRequest
from tinkerbell.executors.progress import mark
from tinkerbell.types import TARGET_PRESETS, LoraConfig


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear layer a LoRA can sit on: weight [O, I]."""

    in_features: int
    out_features: int


class Pair(NamedTuple):
    """The two factors of one layer, views of a flat buffer."""

    A: Tensor
    """[R, I]"""
    B: Tensor
    """[O, R]"""


class Layout:
    """Where each factor of an adapter lies in its flat buffer: A then B, layer after layer, in the model's order."""

    def __init__(self, rank: int, shapes: dict[str, LinearShape]) -> None:
        self.rank = rank
        self.shapes = shapes
        """Layers with a LoRA, by full module name."""
        self.num_parameters = sum(rank * (s.in_features + s.out_features) for s in shapes.values())

    def views(self, flat: Tensor) -> dict[str, Pair]:
        """Factors by module name as views of `flat` [P]."""
        pairs: dict[str, Pair] = {}
        offset = 0
        for name, shape in self.shapes.items():
            middle = offset + self.rank * shape.in_features
            end = middle + self.rank * shape.out_features
            pairs[name] = Pair(
                flat[offset:middle].view(self.rank, shape.in_features),
                flat[middle:end].view(shape.out_features, self.rank),
            )
            offset = end
        return pairs


class Buffer:
    """A flat tensor [P] and its factors."""

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self._layout = layout
        self.flat = torch.zeros(layout.num_parameters, dtype=dtype, device=device)
        self.pairs = layout.views(self.flat)

    def digest(self) -> str:
        """sha256 (hex) over its bytes, little-endian, flat order."""
        return hashlib.sha256(self.flat.cpu().numpy().data).hexdigest()

    def move(self, device: torch.device) -> None:
        """Take it to another device; from CUDA into pinned memory, from where it goes back without a detour."""
        pinned = self.flat.is_cuda and device.type == "cpu"
        moved = torch.empty(self.flat.shape, dtype=self.flat.dtype, device=device, pin_memory=pinned)
        self.flat = moved.copy_(self.flat)
        self.pairs = self._layout.views(self.flat)


class Digests(NamedTuple):
    """What an adapter is, in two hashes."""

    weights: str
    """sha256 (hex) over the weights, little-endian, flat order."""
    state: str
    """sha256 (hex) over weights, both moments and the step count."""


class Adapter:
    """Weights, accumulated gradient, Adam moments and step count of one adapter."""

    def __init__(
        self, lora: LoraConfig, shapes: dict[str, LinearShape], dtype: torch.dtype, device: torch.device
    ) -> None:
        """`shapes`: the layers it sits on, see `target_shapes`."""
        self.lora = lora
        self.scale = lora.alpha / lora.rank
        self.layout = Layout(lora.rank, shapes)
        self.dtype = dtype
        self.device = device
        self.weights = Buffer(self.layout, dtype, device)
        self._moments: tuple[Buffer, Buffer] | None = None
        """None: both are zero. An adapter that is only sampled from never has any."""
        self.gradient: Buffer | None = None
        """Sum over the forward_backward requests since the last optim_step; None where there were none."""
        self.step = 0

    @property
    def exp_avg(self) -> Buffer:
        """First moment, which has memory of its own from now on."""
        return self._made_moments()[0]

    @property
    def exp_avg_sq(self) -> Buffer:
        """Second moment, which has memory of its own from now on."""
        return self._made_moments()[1]

    def _made_moments(self) -> tuple[Buffer, Buffer]:
        if self._moments is None:
            self._moments = self.new_buffer(), self.new_buffer()
        return self._moments

    def _buffers(self) -> list[Buffer]:
        kept = [self.weights, *(self._moments or ())]
        return kept if self.gradient is None else [*kept, self.gradient]

    @property
    def num_bytes(self) -> int:
        """Of everything it holds."""
        return sum(buffer.flat.nbytes for buffer in self._buffers())

    def move(self, device: torch.device) -> None:
        """Take everything to another device; nothing happens where it is there."""
        if device != self.device:
            for buffer in self._buffers():
                mark()
                buffer.move(device)
            self.device = device

    def new_buffer(self) -> Buffer:
        """A zeroed buffer of this adapter's layout."""
        return Buffer(self.layout, self.dtype, self.device)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """A uniform in ±1/sqrt(I), which is PEFT's kaiming_uniform(a=sqrt 5), and B zero.

        Each layer has its own generator, so its A does not depend on which other layers are targets.
        """
        for name, pair in self.weights.pairs.items():
            mark()
            key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            bound = 1.0 / math.sqrt(pair.A.shape[1])
            pair.A.copy_(torch.empty(pair.A.shape).uniform_(-bound, bound, generator=generator))

    def digest(self) -> str:
        """sha256 (hex) over weights, both moments (little-endian, flat order) and the step count."""
        return self.digests().state

    def digests(self) -> "Digests":
        """`digest`, and on the way there that of the weights alone, which costs nothing: they come first."""
        digest = hashlib.sha256(self.weights.flat.cpu().numpy().data)
        weights = digest.hexdigest()
        if self._moments is None:
            mark()
            zeros = torch.zeros(self.layout.num_parameters, dtype=self.dtype).numpy().data
            digest.update(zeros)
            digest.update(zeros)
        for buffer in self._moments or ():
            mark()
            digest.update(buffer.flat.cpu().numpy().data)
        digest.update(struct.pack("<q", self.step))
        return Digests(weights, digest.hexdigest())


def target_shapes(lora: LoraConfig, shapes: dict[str, LinearShape]) -> dict[str, LinearShape]:
    """The layers of the model that `lora.targets` names, in the model's order.

    A preset takes those of its words that the model has. Raises InvalidRequest for a word that matches no layer.
    """
    known = {name.rsplit(".", 1)[-1] for name in shapes}
    wanted: set[str] = set()
    for target in lora.targets:
        words = set(TARGET_PRESETS.get(target, (target,))) & known
        if not words:
            raise InvalidRequest(f"target `{target}`: no such layer in this model; it has {', '.join(sorted(known))}")
        wanted |= words
    return {name: shape for name, shape in shapes.items() if name.rsplit(".", 1)[-1] in wanted}
