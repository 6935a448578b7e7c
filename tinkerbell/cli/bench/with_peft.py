"""The alternatives: transformers and PEFT as people use them, on the same adapters.

Shapes: B sequences of a batch, L tokens of the longest.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as read_safetensors
from torch import Tensor
from torch.nn import functional

from tinkerbell.cli.bench.workload import Tenant
from tinkerbell.executors.hf.adapter import LinearShape
from tinkerbell.executors.port import AdapterState
from tinkerbell.types import TARGET_PRESETS, AdapterId, Datum

IGNORED = -100
"""Target of a padded position, as torch's cross_entropy has it."""


class WithPeft:
    """One PEFT model with many adapters; `set_adapter` says whose turn it is."""

    def __init__(self, directory: str, states: dict[AdapterId, AdapterState]) -> None:
        """`directory`: of the base model; `states`: what each adapter starts from."""
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
        base.generation_config.eos_token_id = None  # so that every sample gets its full length
        self.layers = {
            name: LinearShape(module.in_features, module.out_features)
            for name, module in base.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        """Every linear layer, the unembedding included."""
        self.model: Any = _quietly(lambda: _with_adapters(base, states))

    def reset(self) -> None:
        """Drop accumulated gradients."""
        self.model.zero_grad(set_to_none=True)

    def taking_turns(self, tenants: Sequence[Tenant], *, pad_to: int = 0) -> list[float]:
        """Losses; one sequence after the other, without padding unless `pad_to` is larger than it."""
        losses = []
        with _ordinary_kernels():
            for tenant in tenants:
                self.model.set_adapter(tenant.adapter)
                losses.append(sum(self._forward_backward([datum], pad_to) for datum in tenant.data))
        return losses

    def padded(self, tenants: Sequence[Tenant]) -> list[float]:
        """Losses; the sequences of each tenant in one padded batch."""
        losses = []
        with _ordinary_kernels():
            for tenant in tenants:
                self.model.set_adapter(tenant.adapter)
                losses.append(self._forward_backward(tenant.data, 0))
        return losses

    def _forward_backward(self, data: Sequence[Datum], pad_to: int) -> float:
        longest = max(pad_to, *(datum.num_tokens for datum in data))
        tokens = _padded([_int32(datum.tokens) for datum in data], longest, 0)
        targets = _padded([_int32(datum.targets) for datum in data], longest, IGNORED)
        weights = _padded([_float32(datum.loss_inputs["weights"]) for datum in data], longest, 0)
        # Without padding no mask is passed: transformers then takes its quickest path.
        mask = None if bool((targets != IGNORED).all()) else (targets != IGNORED).long()
        logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        each = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
        loss = (each * weights.flatten()).sum()
        torch.autograd.backward(loss)
        return float(loss.detach())

    def generate_one_by_one(self, prompts: Sequence[tuple[AdapterId, bytes]], max_tokens: int) -> list[bytes]:
        """Greedy continuations, int32; requests of one adapter come together, so that it is set once."""
        found: dict[int, bytes] = {}
        with _ordinary_kernels():
            for index in sorted(range(len(prompts)), key=lambda index: prompts[index][0]):
                adapter, prompt = prompts[index]
                self.model.set_adapter(adapter, inference_mode=True)
                (found[index],) = self._generate([prompt], max_tokens)
        return [found[index] for index in range(len(prompts))]

    def generate_by_adapter(self, prompts: Sequence[tuple[AdapterId, bytes]], max_tokens: int) -> list[bytes]:
        """The same with one padded batch for each adapter."""
        found: dict[int, bytes] = {}
        with _ordinary_kernels():
            for adapter in dict.fromkeys(adapter for adapter, _ in prompts):
                places = [index for index, (whose, _) in enumerate(prompts) if whose == adapter]
                self.model.set_adapter(adapter, inference_mode=True)
                answers = self._generate([prompts[index][1] for index in places], max_tokens)
                found |= dict(zip(places, answers, strict=True))
        return [found[index] for index in range(len(prompts))]

    def generate_mixed(self, prompts: Sequence[tuple[AdapterId, bytes]], max_tokens: int) -> list[bytes]:
        """The same in one padded batch of all adapters (PEFT's `adapter_names`)."""
        names = [adapter for adapter, _ in prompts]
        with _ordinary_kernels():
            return self._generate([prompt for _, prompt in prompts], max_tokens, adapter_names=names)

    def _generate(self, prompts: Sequence[bytes], max_tokens: int, **options: Any) -> list[bytes]:
        longest = max(len(prompt) for prompt in prompts) // 4
        tokens = _padded([_int32(prompt) for prompt in prompts], longest, 0, left=True)
        mask = _padded([torch.ones(len(prompt) // 4, dtype=torch.long) for prompt in prompts], longest, 0, left=True)
        found = self.model.generate(
            input_ids=tokens, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens,
            pad_token_id=0, **options,
        )  # fmt: skip
        return [row.numpy().astype("<i4").tobytes() for row in found[:, longest:]]


def _with_adapters(base: Any, states: dict[AdapterId, AdapterState]) -> Any:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    model: Any = None
    for adapter, state in states.items():
        lora = state.lora
        targets = sorted({word for target in lora.targets for word in TARGET_PRESETS.get(target, (target,))})
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, bias="none",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        if model is None:
            model = get_peft_model(base, config, adapter_name=adapter)
        else:
            model.add_adapter(adapter, config)
        set_peft_model_state_dict(model, read_safetensors(state.weights), adapter_name=adapter)
    return model.eval()


def _quietly(make: Callable[[], Any]) -> Any:
    """Without PEFT's remarks on transformers and on tied weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


@contextmanager
def _ordinary_kernels() -> Iterator[None]:
    """Without the deterministic kernels our executor asks for: nobody who uses PEFT has them on."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


def _padded(parts: Sequence[Tensor], length: int, value: int, *, left: bool = False) -> Tensor:
    """[B, L] of tensors [<= L]."""
    pads = [(length - len(part), 0) if left else (0, length - len(part)) for part in parts]
    return torch.stack([functional.pad(part, pad, value=value) for part, pad in zip(parts, pads, strict=True)])


def _int32(array: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(array, "<i4").astype("int64"))


def _float32(array: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(array, "<f4").copy())
