"""Adapter <-> AdapterState, in the files PEFT writes and reads.

adapter_model.safetensors: `base_model.model.<module>.lora_A.weight` [R, I] and `...lora_B.weight` [O, R], fp32.
Optimizer: the same names with `.exp_avg` and `.exp_avg_sq`, and `step` [1] int64. Equal adapters give equal bytes.
"""

import json
import math

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tinkerbell.errors import InvalidRequest
from tinkerbell.executors.hf.adapter import Adapter, Buffer, LinearShape, target_shapes
from tinkerbell.executors.port import AdapterState
from tinkerbell.executors.progress import mark

METADATA = {"format": "pt"}
"""One entry only: safetensors writes several in no fixed order."""


def save(adapter: Adapter, base_model: str) -> AdapterState:
    """A copy of the adapter; `base_model` is what PEFT is told to load."""
    moments = _tensors(adapter.exp_avg, ".exp_avg") | _tensors(adapter.exp_avg_sq, ".exp_avg_sq")
    return AdapterState(
        lora=adapter.lora,
        step=adapter.step,
        weights=safetensors.torch.save(_tensors(adapter.weights, ""), METADATA),
        adapter_config=_config(adapter, base_model),
        optimizer=safetensors.torch.save(moments | {"step": torch.tensor([adapter.step])}, METADATA),
        digest=adapter.digest(),
    )


def load(
    state: AdapterState,
    with_optimizer: bool,
    shapes: dict[str, LinearShape],
    dtype: torch.dtype,
    device: torch.device,
) -> Adapter:
    """The adapter in `state`; without the optimizer moments and step count are zero.

    `shapes`: every layer of the model a LoRA can sit on. Raises InvalidRequest where a file, name or shape is
    not what `state.lora` and the model say.
    """
    adapter = Adapter(state.lora, target_shapes(state.lora, shapes), dtype, device)
    _fill("weights", {"": adapter.weights}, _parse("weights", state.weights))
    if with_optimizer:
        if state.optimizer is None:
            raise InvalidRequest("this checkpoint has no optimizer state; load it with_optimizer=false")
        tensors = _parse("optimizer", state.optimizer)
        count = tensors.pop("step", None)
        if count is None or count.numel() != 1 or count.dtype != torch.int64 or int(count) != state.step:
            raise InvalidRequest("optimizer: the step count is missing or not that of the checkpoint")
        _fill("optimizer", {".exp_avg": adapter.exp_avg, ".exp_avg_sq": adapter.exp_avg_sq}, tensors)
        adapter.step = state.step
    return adapter


def _names(buffer: Buffer, suffix: str) -> dict[str, Tensor]:
    """The views of `buffer` by the names in the file."""
    named: dict[str, Tensor] = {}
    for module, pair in buffer.pairs.items():
        named[f"base_model.model.{module}.lora_A.weight{suffix}"] = pair.A
        named[f"base_model.model.{module}.lora_B.weight{suffix}"] = pair.B
    return named


def _tensors(buffer: Buffer, suffix: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, view in _names(buffer, suffix).items():
        mark()
        tensors[name] = view.detach().cpu().contiguous().clone()
    return tensors


def _config(adapter: Adapter, base_model: str) -> bytes:
    alpha = adapter.lora.alpha
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(alpha) if alpha == math.floor(alpha) else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.lora.rank,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in adapter.layout.shapes}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(config, indent=2, sort_keys=True).encode()


def _parse(what: str, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as exc:
        raise InvalidRequest(f"{what}: not a safetensors file: {exc}") from exc


def _fill(what: str, buffers: dict[str, Buffer], tensors: dict[str, Tensor]) -> None:
    """Copy `tensors` into the buffers (suffix -> buffer); names and shapes must match exactly."""
    views = {name: view for suffix, buffer in buffers.items() for name, view in _names(buffer, suffix).items()}
    for name in sorted(views.keys() ^ tensors.keys()):
        problem = "is missing" if name in views else "does not belong to this adapter"
        raise InvalidRequest(f"{what}: `{name}` {problem}")
    for name, view in views.items():
        mark()
        tensor = tensors[name]
        if tensor.shape != view.shape:
            raise InvalidRequest(f"{what}: `{name}` is {list(tensor.shape)}, not {list(view.shape)}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise InvalidRequest(f"{what}: `{name}` has values that are not finite numbers")
        view.copy_(tensor)
