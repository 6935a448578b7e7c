"""An adapter of the fake executor: weights, gradient and Adam moments as short float64 vectors.

Shapes: K features, K = 16 * rank.
"""

import hashlib
import json
import math
import random
import struct
from array import array

from tinkerbell.errors import Corrupt, InvalidRequest, UserError
from tinkerbell.executors.port import AdapterState
from tinkerbell.types import AdamParams, LoraConfig

FEATURES_PER_RANK = 16
A_SPREAD = 4.0
"""Makes a step of usual size move logits as much as one of a real adapter does."""


class NonFinite(UserError):
    """A loss, gradient or weight is not a finite number."""

    slug = "non-finite"


class NoGradients(UserError):
    """There is no accumulated gradient to apply."""

    slug = "no-gradients"


class FakeAdapter:
    """State of one adapter."""

    def __init__(self, lora: LoraConfig) -> None:
        self.lora = lora
        self.scale = lora.alpha / lora.rank
        self.num_features = FEATURES_PER_RANK * lora.rank
        self.weights = _zeros(2 * self.num_features)
        """[2 K]: A, then B."""
        self.exp_avg = _zeros(2 * self.num_features)
        self.exp_avg_sq = _zeros(2 * self.num_features)
        self.gradient: array[float] | None = None
        """[2 K] sum since the last optim_step; None where nothing was added."""
        self.step = 0

    def initialise(self, seed: int) -> None:
        """A uniform in ±A_SPREAD, B zero."""
        generator = random.Random(seed)
        for k in range(self.num_features):
            self.weights[k] = generator.uniform(-A_SPREAD, A_SPREAD)

    def deltas(self) -> list[float]:
        """[K] scale * A B."""
        k = self.num_features
        return [self.scale * a * b for a, b in zip(self.weights[:k], self.weights[k:], strict=True)]

    def chain(self, by_delta: list[float]) -> "array[float]":
        """[2 K] gradient by A and B, given the gradient by `deltas` [K]."""
        k = self.num_features
        by_a = [self.scale * b * g for b, g in zip(self.weights[k:], by_delta, strict=True)]
        by_b = [self.scale * a * g for a, g in zip(self.weights[:k], by_delta, strict=True)]
        return array("d", by_a + by_b)

    def accumulate(self, gradient: "array[float]") -> None:
        """Add one request's gradient [2 K]."""
        if self.gradient is None:
            self.gradient = _zeros(len(gradient))
        for i, g in enumerate(gradient):
            self.gradient[i] += g

    def optim_step(self, adam: AdamParams) -> float:
        """One AdamW step on the accumulated gradient, which is cleared; returns its L2 norm before clipping.

        Raises NoGradients, or NonFinite where the norm or the new weights are not finite; weights, moments and
        step count are then as they were, the gradient is dropped.
        """
        if self.gradient is None:
            raise NoGradients("there is no gradient: no forward_backward succeeded since the last optim_step")
        gradient, self.gradient = self.gradient, None
        norm = math.sqrt(math.fsum(g * g for g in gradient))
        if not math.isfinite(norm):
            raise NonFinite("the accumulated gradient is not finite; it was dropped, the weights are as they were")
        clip = adam.grad_clip_norm
        factor = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
        weights, exp_avg, exp_avg_sq = self.weights[:], self.exp_avg[:], self.exp_avg_sq[:]
        step = self.step + 1
        correction1 = 1 - adam.beta1**step
        correction2 = 1 - adam.beta2**step
        decay = 1 - adam.learning_rate * adam.weight_decay
        for i, g in enumerate(gradient):
            g *= factor
            exp_avg[i] = m = adam.beta1 * exp_avg[i] + (1 - adam.beta1) * g
            exp_avg_sq[i] = v = adam.beta2 * exp_avg_sq[i] + (1 - adam.beta2) * g * g
            update = (m / correction1) / (math.sqrt(v / correction2) + adam.eps)
            weights[i] = decay * weights[i] - adam.learning_rate * update
        if not all(map(math.isfinite, weights)):
            raise NonFinite("this step would make weights that are not finite; the gradient was dropped")
        self.weights, self.exp_avg, self.exp_avg_sq, self.step = weights, exp_avg, exp_avg_sq, step
        return norm

    def digest(self) -> str:
        """sha256 (hex) over weights, moments and step count."""
        digest = hashlib.sha256()
        for values in (self.weights, self.exp_avg, self.exp_avg_sq):
            digest.update(values)
        digest.update(struct.pack("<q", self.step))
        return digest.hexdigest()

    def weights_digest(self) -> str:
        """sha256 (hex) over the weights."""
        return hashlib.sha256(self.weights).hexdigest()

    def gradient_digest(self) -> str | None:
        """sha256 (hex) over the accumulated gradient; None where there is none."""
        return None if self.gradient is None else hashlib.sha256(self.gradient).hexdigest()

    def state(self) -> AdapterState:
        """A copy, in the files the port names; the tensors are the fake's own, of no use to PEFT."""
        k = self.num_features
        config = {"peft_type": "LORA", "r": self.lora.rank, "lora_alpha": self.lora.alpha}
        config["target_modules"] = list(self.lora.targets)
        return AdapterState(
            lora=self.lora,
            step=self.step,
            weights=_dump({"lora_A": self.weights[:k], "lora_B": self.weights[k:]}),
            adapter_config=json.dumps(config, sort_keys=True).encode(),
            optimizer=_dump({"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}),
            digest=self.digest(),
        )

    @classmethod
    def from_state(cls, state: AdapterState, with_optimizer: bool) -> "FakeAdapter":
        """The adapter `state` was taken from, or its weights alone. Raises Corrupt where it does not fit."""
        adapter = cls(state.lora)
        files = _read(state.weights)
        adapter.weights = files.get("lora_A", _zeros(0)) + files.get("lora_B", _zeros(0))
        if with_optimizer:
            if state.optimizer is None:
                raise InvalidRequest("this state holds no optimizer")
            moments = _read(state.optimizer)
            adapter.exp_avg = moments.get("exp_avg", _zeros(0))
            adapter.exp_avg_sq = moments.get("exp_avg_sq", _zeros(0))
            adapter.step = state.step
        if any(len(v) != 2 * adapter.num_features for v in (adapter.weights, adapter.exp_avg, adapter.exp_avg_sq)):
            raise Corrupt("the state's tensors do not have the shape its rank asks for")
        if with_optimizer and adapter.digest() != state.digest:
            raise Corrupt("the state does not have the digest it was saved with")
        return adapter


def _zeros(length: int) -> "array[float]":
    return array("d", bytes(8 * length))


def _dump(tensors: "dict[str, array[float]]") -> bytes:
    """Vectors in the safetensors format (8-byte header length, JSON header, data), little-endian float64."""
    header: dict[str, object] = {}
    data = b""
    for name, values in tensors.items():
        raw = struct.pack(f"<{len(values)}d", *values)
        header[name] = {
            "dtype": "F64",
            "shape": [len(values)],
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _read(file: bytes) -> "dict[str, array[float]]":
    """The inverse of `_dump`. Raises Corrupt for anything else."""
    try:
        (length,) = struct.unpack_from("<Q", file)
        header, data = json.loads(file[8 : 8 + length]), file[8 + length :]
        tensors: dict[str, array[float]] = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            tensors[name] = array("d", struct.unpack(f"<{(stop - start) // 8}d", data[start:stop]))
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise Corrupt(f"the state's tensors cannot be read: {exc}") from exc
    return tensors
