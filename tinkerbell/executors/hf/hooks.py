"""Turns a loaded Hugging Face causal language model into a Runtime, in place; refuses what cannot be hooked."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tinkerbell.errors import InvalidRequest
from tinkerbell.executors.hf import attention
from tinkerbell.executors.hf.adapter import LinearShape
from tinkerbell.executors.hf.fused import fuse
from tinkerbell.executors.hf.gemm import Heights
from tinkerbell.executors.hf.lora import MultiLoraLinear
from tinkerbell.executors.hf.recompute import make_recomputable
from tinkerbell.executors.hf.runtime import Pass, Runtime

SELF_CHECK_TOLERANCE = 1e-2
"""Largest difference in nats between the hooked model's logprobs and transformers' own, in fp32; a wrong mask,
scale or position is off by far more, rounding by far less."""


def install(model: Any) -> Runtime:
    """Freeze `model` (a transformers `...ForCausalLM`) and hook its linears, activations, rotary tables, attention.

    Raises InvalidRequest naming the module where the architecture has something the packed pass cannot reproduce.
    Afterwards the model works through the Runtime only.
    """
    model.requires_grad_(False).eval()
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or decoder is model or type(head) is not nn.Linear:
        raise InvalidRequest(f"{type(model).__name__}: no plain linear unembedding on top of a decoder")
    _refuse_scaled_logits(model)
    probe = torch.arange(1, 25, device=head.weight.device) % head.weight.shape[0]
    expected = _reference_logprobs(model, probe)

    attention.register()
    model.set_attn_implementation(attention.NAME)
    if model.config._attn_implementation != attention.NAME:
        raise InvalidRequest(f"{type(model).__name__} does not let its attention be replaced")
    runtime = Runtime(decoder, head.weight.dtype, head.weight.device)
    for name, module in list(model.named_modules()):
        if hasattr(module, "layer_idx"):
            module.tinkerbell_runtime = runtime
        for child_name, child in list(module.named_children()):
            full = f"{name}.{child_name}" if name else child_name
            hooked = _hook(full, child, runtime)
            if hooked is not child:
                setattr(module, child_name, hooked)
    hooked_head = model.get_output_embeddings()
    assert isinstance(hooked_head, MultiLoraLinear)
    runtime.head = hooked_head
    runtime.shapes = {
        name: LinearShape(module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, MultiLoraLinear)
    }
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, MultiLoraLinear) and m is not hooked_head]
    kinds = {(weight.shape, weight.stride(), weight.data_ptr() % 64): weight for weight in weights}
    runtime.heights = Heights(list(kinds.values()), hooked_head.weight.detach())
    fuse(decoder, runtime)
    make_recomputable(decoder, runtime)
    _self_check(runtime, type(model).__name__, probe, expected)
    return runtime


def _refuse_scaled_logits(model: Any) -> None:
    """The head's products are taken as they are; that a model scales or caps them may not show on a short probe."""
    config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        value = getattr(config, name, None)
        if value not in (None, 1, 1.0):
            raise InvalidRequest(f"{type(model).__name__}: `{name}` = {value} of its logits is not supported")


def _hook(name: str, module: nn.Module, runtime: Runtime) -> nn.Module:
    """What takes the place of `module`, often itself."""
    kind = type(module).__name__
    if type(module) is nn.Linear:
        return MultiLoraLinear(module, name, runtime)
    if isinstance(module, MultiLoraLinear | SplitRows | SplitRotary):
        return module
    if kind.endswith("RotaryEmbedding"):
        return SplitRotary(module, runtime)
    if any(True for _ in module.children()):
        if any(True for _ in module.parameters(recurse=False)):
            raise InvalidRequest(f"module `{name}` ({kind}) has weights of its own; only linear layers can be hooked")
        return module
    if any(True for _ in module.parameters(recurse=False)):
        if not (kind.endswith("Norm") or isinstance(module, nn.Embedding)):
            raise InvalidRequest(f"module `{name}` is a {kind}; only linear, embedding and norm layers are supported")
        return module
    if type(module) in (nn.Identity, nn.Dropout):
        return module
    return SplitRows(module, runtime)


class SplitRows(nn.Module):
    """An activation, applied to each micro-batch by itself unless rows are whole vectors: vector and remainder loops of
    a kernel round differently, and which element falls into which depends on the number of rows."""

    def __init__(self, base: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        self.base = base
        self._runtime = runtime

    def forward(self, x: Tensor) -> Tensor:
        """[..., T, F] -> [..., T, F]"""
        bounds = self._runtime.current.vectors_apart(x.shape[-1])
        if len(bounds) == 2:
            whole: Tensor = self.base(x)
            return whole
        sizes = [stop - start for start, stop in pairwise(bounds)]
        return torch.cat([self.base(part) for part in torch.split(x, sizes, -2)], -2)


class SplitRotary(nn.Module):
    """Rotary tables, computed for each micro-batch by itself: length-dependent variants (longrope) choose their
    frequencies by the largest position they are shown."""

    def __init__(self, base: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        self.base = base
        self._runtime = runtime

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """x [1, T, D], position_ids [1, T] -> (cos, sin), each [1, T, head size]"""
        sizes = self._runtime.current.sizes
        parts = [
            self.base(rows, positions, *args, **kwargs)
            for rows, positions in zip(torch.split(x, sizes, 1), torch.split(position_ids, sizes, 1), strict=True)
        ]
        return torch.cat([cos for cos, _ in parts], 1), torch.cat([sin for _, sin in parts], 1)


@torch.no_grad()
def _reference_logprobs(model: Any, tokens: Tensor) -> Tensor:
    """[2, 12, V] from transformers' own forward on two sequences."""
    logits: Tensor = model(input_ids=tokens.view(2, 12), use_cache=False).logits
    return torch.log_softmax(logits.double(), -1)


@torch.no_grad()
def _self_check(runtime: Runtime, architecture: str, tokens: Tensor, expected: Tensor) -> None:
    """Compare the packed pass with transformers: catches scaled or capped logits, other masks, other positions."""
    positions = torch.arange(12, device=tokens.device).repeat(2)
    plan = Pass(bounds=(0, 12, 24), attention=attention.PackedCausal([12, 12]))
    try:
        logits = runtime.logits(runtime.hidden(tokens, positions, plan), plan)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as exc:
        # Whatever a module of an unknown architecture makes of rows of several sequences.
        raise InvalidRequest(f"{architecture}: the packed forward pass fails ({exc}); it is not supported") from exc
    found = torch.log_softmax(logits.double(), -1).view_as(expected)
    tolerance = SELF_CHECK_TOLERANCE if runtime.dtype in (torch.float32, torch.float64) else 0.5
    difference = (found - expected).abs().max().item()
    if not difference <= tolerance:
        raise InvalidRequest(
            f"{architecture}: the packed forward pass differs from transformers' by {difference:.3g} nats; "
            "this architecture is not supported"
        )
