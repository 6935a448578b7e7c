"""Data and a small driver for tests of the HF executor's training side."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tinkerbell.executors.hf import optimizer
from tinkerbell.executors.hf.adapter import Adapter, target_shapes
from tinkerbell.executors.hf.model import LoadedModel
from tinkerbell.executors.hf.trainer import Trainer
from tinkerbell.executors.port import ForwardBackward, ForwardBackwardDone, UnitFailed
from tinkerbell.types import AdamParams, Datum, LoraConfig, LossSpec


def ints(values: Sequence[int]) -> bytes:
    """[N] int32 as the contracts want them."""
    return np.asarray(values, "<i4").tobytes()


def floats(values: Sequence[float]) -> bytes:
    """[N] float32 as the contracts want them."""
    return np.asarray(values, "<f4").tobytes()


def sequence(tokens: Sequence[int], **loss_inputs: Sequence[float]) -> Datum:
    """A datum that predicts each next token of `tokens`."""
    return Datum(ints(tokens[:-1]), ints(tokens[1:]), {name: floats(v) for name, v in loss_inputs.items()})


def soft_data(seed: int, lengths: Sequence[int], vocab_size: int, num_targets: int) -> list[Datum]:
    """Random tokens with several targets each, some of them the same, weighted anyhow."""
    rng = np.random.default_rng(seed)
    shape = {length: (length, num_targets) for length in lengths}
    return [
        Datum(
            ints(rng.integers(0, vocab_size, length).tolist()),
            ints(rng.integers(0, vocab_size, shape[length]).ravel().tolist()),
            {"weights": floats(rng.normal(0, 1, shape[length]).ravel().tolist())},
        )
        for length in lengths
    ]


def random_data(seed: int, lengths: Sequence[int], vocab_size: int, *, weights: bool = True) -> list[Datum]:
    """Random tokens; the first third of each sequence has weight 0."""
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        tokens = rng.integers(3, vocab_size, length + 1).tolist()
        extra = {"weights": [0.0] * (length // 3) + [1.0] * (length - length // 3)} if weights else {}
        data.append(sequence(tokens, **extra))
    return data


@dataclass
class Bench:
    """A loaded model, adapters, and a trainer over them."""

    model: LoadedModel
    adapters: dict[str, Adapter] = field(default_factory=dict)
    pack_tokens: int = 1024
    exact: bool = True

    def __post_init__(self) -> None:
        runtime, info = self.model.runtime, self.model.info
        self.trainer = Trainer(runtime, info, self.adapters, self.pack_tokens, exact=self.exact)
        self.requests = 0

    def add(self, name: str, lora: LoraConfig, seed: int, *, b_scale: float = 0.0) -> Adapter:
        """A fresh adapter; `b_scale` > 0 makes B random, so that A has a gradient from the start."""
        runtime = self.model.runtime
        adapter = Adapter(lora, target_shapes(lora, runtime.shapes), runtime.adapter_dtype, runtime.device)
        adapter.initialise(seed)
        if b_scale:
            generator = torch.Generator().manual_seed(seed)
            for pair in adapter.weights.pairs.values():
                pair.B.copy_(torch.empty(pair.B.shape).normal_(0, b_scale, generator=generator))
        self.adapters[name] = adapter
        return adapter

    def unit(self, name: str, data: list[Datum], loss: LossSpec | None = None, **flags: bool) -> ForwardBackward:
        """A request of its own, in one chunk unless `flags` say otherwise."""
        self.requests += 1
        return ForwardBackward(request=self.requests, adapter=name, data=data, loss=loss or LossSpec(), **flags)  # type: ignore[arg-type]

    def train(self, *units: ForwardBackward) -> list[ForwardBackwardDone]:
        """Run together; every unit must succeed."""
        answers = self.trainer.run(units)
        for answer in answers:
            assert not isinstance(answer, UnitFailed), answer
        return [answer for answer in answers if isinstance(answer, ForwardBackwardDone)]

    def step(self, name: str, adam: AdamParams | None = None) -> float:
        """Returns the gradient norm."""
        return optimizer.step(self.adapters[name], adam or AdamParams(learning_rate=1e-3))

    def gradient(self, name: str) -> torch.Tensor:
        """The accumulated gradient [P]."""
        buffer = self.adapters[name].gradient
        assert buffer is not None
        return buffer.flat


def logprobs(answer: ForwardBackwardDone) -> np.ndarray:
    """All logprobs of an answer, [N] float32."""
    return np.frombuffer(b"".join(answer.logprobs), "<f4")
