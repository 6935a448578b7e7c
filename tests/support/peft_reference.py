"""The reference: Hugging Face model + PEFT + torch.optim.AdamW, one adapter, one sequence at a time."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinkerbell.executors.hf.adapter import Adapter
from tinkerbell.types import AdamParams, Datum

LossOf = Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


class Reference:
    """One adapter on its own copy of the model, in `dtype`."""

    def __init__(self, directory: Path, adapter: Adapter, dtype: torch.dtype, adam: AdamParams | None = None) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype, attn_implementation="sdpa")
        config = LoraConfig(
            r=adapter.lora.rank,
            lora_alpha=adapter.lora.alpha,  # type: ignore[arg-type]
            target_modules=sorted({name.rsplit(".", 1)[-1] for name in adapter.layout.shapes}),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        self.model: Any = quietly(get_peft_model, base, config).eval()
        self.parameters: list[torch.nn.Parameter] = []
        self.terms = torch.zeros(0)
        """What the last `forward_backward` added up, token by token unless its `loss_of` gave less."""
        found = dict(self.model.named_parameters())
        for name, pair in adapter.weights.pairs.items():
            for factor, ours in (("lora_A", pair.A), ("lora_B", pair.B)):
                parameter = found[f"base_model.model.{name}.{factor}.default.weight"]
                parameter.data = ours.detach().to(dtype, copy=True)
                self.parameters.append(parameter)
        trainable = sum(parameter.requires_grad for parameter in found.values())
        assert trainable == len(self.parameters)
        adam = adam or AdamParams(learning_rate=1e-3)
        self.clip = adam.grad_clip_norm
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps,
            weight_decay=adam.weight_decay,
        )  # fmt: skip

    def forward(self, datum: Datum) -> torch.Tensor:
        """[N K] logprobs of the targets."""
        tokens = torch.from_numpy(np.frombuffer(datum.tokens, "<i4").astype("int64"))
        targets = torch.from_numpy(np.frombuffer(datum.targets, "<i4").astype("int64"))
        logits = self.model(input_ids=tokens[None], use_cache=False).logits[0]
        return torch.log_softmax(logits, -1).gather(-1, targets.view(len(tokens), -1)).flatten()

    def forward_backward(self, data: list[Datum], loss_of: LossOf | None = None) -> float:
        """Adds gradients; returns the summed loss. Default: weighted cross-entropy."""
        parts = []
        for datum in data:
            inputs = {
                name: torch.from_numpy(np.frombuffer(array, "<f4").copy()) for name, array in datum.loss_inputs.items()
            }
            logprobs = self.forward(datum)
            terms = loss_of(logprobs, inputs) if loss_of else -(logprobs * inputs.get("weights", 1.0))
            terms.sum().backward()
            parts.append(terms.detach().reshape(-1))
        self.terms = torch.cat(parts)
        return sum(part.sum().item() for part in parts)

    def gradient(self) -> torch.Tensor:
        """[P] in the order of `Adapter`'s flat buffer."""
        return torch.cat([_grad(parameter).reshape(-1) for parameter in self.parameters])

    def weights(self) -> torch.Tensor:
        """[P] in the order of `Adapter`'s flat buffer."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])

    def set_weights(self, flat: torch.Tensor) -> None:
        """Take the weights [P] of `Adapter`'s flat buffer."""
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.data.copy_(part.view_as(parameter))

    def step(self) -> None:
        """Clip as the adapter's settings say, one AdamW step, clear gradients."""
        if self.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def adamw_steps(adam: AdamParams, start: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """[P] after steps of torch.optim.AdamW in the dtype of `start` [P], one for each gradient."""
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW(
        [parameter], lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
    )
    for gradient in gradients:
        parameter.grad = gradient.to(start.dtype, copy=True)
        if adam.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_([parameter], adam.grad_clip_norm)
        optimizer.step()
    return parameter.detach()


def quietly(make: Callable[..., Any], *args: Any) -> Any:
    """Call PEFT without its own deprecation warnings about transformers and its remarks on tied weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args)


def _grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad
