"""Decoder layers that may forget their inside in forward and compute it again in backward: time for memory."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tinkerbell.errors import InvalidRequest
from tinkerbell.executors.hf.runtime import Runtime


def make_recomputable(decoder: nn.Module, runtime: Runtime) -> None:
    """Let the layers of `decoder` obey `Pass.recompute`. Raises InvalidRequest where it has none that could."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InvalidRequest(f"{type(decoder).__name__} has no layers that could be computed again in backward")
    for layer in layers:
        layer.forward = _recomputable(layer.forward, runtime)


def _recomputable(forward: Callable[..., Any], runtime: Runtime) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        plan = runtime.current
        if not (plan.recompute and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        # The same operations on the same shapes: the same bits. Backward runs outside the pass, hence the context.
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), runtime.running(plan)), **kwargs,
        )  # fmt: skip

    return run
