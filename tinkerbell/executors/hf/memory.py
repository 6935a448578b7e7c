"""How much memory the activations of a training pass take."""

import torch
from torch import Tensor

from tinkerbell.executors.hf.adapter import Adapter
from tinkerbell.executors.hf.attention import PackedCausal
from tinkerbell.executors.hf.head import target_logprobs
from tinkerbell.executors.hf.runtime import Pass, RowRange, Runtime
from tinkerbell.types import LoraConfig

TRIAL_TOKENS = 64


def activation_bytes_per_token(runtime: Runtime) -> int:
    """What a token of a pass keeps until backward where every layer has a LoRA: counted in a trial pass."""
    adapter = Adapter(LoraConfig(rank=16), runtime.shapes, runtime.adapter_dtype, runtime.device)
    rows = RowRange(0, TRIAL_TOKENS, adapter, adapter.new_buffer())
    plan = Pass((0, TRIAL_TOKENS), (rows,), PackedCausal([TRIAL_TOKENS]))
    tokens = torch.zeros(TRIAL_TOKENS, dtype=torch.long, device=runtime.device)
    own = {weight.untyped_storage().data_ptr() for weight in (*runtime.weights(), adapter.weights.flat)}
    kept: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        positions = torch.arange(TRIAL_TOKENS, device=runtime.device)
        hidden = runtime.hidden(tokens, positions, plan)
        target_logprobs(runtime, hidden, [tokens[:, None]], plan)
        # Everything is alive up to here, so no address was counted for two tensors.
        return sum(kept.values()) // TRIAL_TOKENS
