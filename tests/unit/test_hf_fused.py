"""RMSNorm, SwiGLU and rotary embedding of our own: transformers' bits forward, the true gradient backward."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.rounding import assert_missed_like
from tests.support.tiny_model import make
from tinkerbell.executors.hf import hooks
from tinkerbell.executors.hf.attention import PackedCausal
from tinkerbell.executors.hf.fused import RMSNormFn, RotaryFn, SwiGLUFn
from tinkerbell.executors.hf.runtime import Pass


def test_gradients_are_those_of_autograd_in_fp64() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: RMSNormFn.apply(t, weight, 1e-3), (x,))
    heads = torch.randn(1, 4, 3, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
    # Halves of the tables need not be alike.
    cos, sin = torch.randn(1, 4, 8, dtype=torch.float64), torch.randn(1, 4, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: RotaryFn.apply(t, cos, sin), (heads,))
    gate, up = (torch.randn(1, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: SwiGLUFn.apply(g, u, (0, 1, 5)), (gate, up))


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma", "Mistral"])
def test_a_fused_model_says_what_its_own_code_says(family: str) -> None:
    import transformers

    more: dict[str, Any] = {"head_dim": 16} if family in ("Gemma", "Qwen3") else {}
    plain, fused = make(family, **more), make(family, **more)
    name = f"{family.lower()}"
    module = getattr(transformers.models, name)
    before = getattr(module, f"modeling_{name}").apply_rotary_pos_emb
    for norm in (m for model in (plain, fused) for m in model.modules() if type(m).__name__.endswith("RMSNorm")):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    fused.load_state_dict(plain.state_dict())
    runtime = hooks.install(fused)
    norms, attentions = _patched(fused, "RMSNorm"), _patched(fused, "Attention")
    assert norms == sum(type(m).__name__.endswith("RMSNorm") for m in plain.modules()) and attentions == 2
    assert _patched(fused, "MLP") == (0 if family == "Gemma" else 2), "Gemma's gate is a GELU"
    assert getattr(module, f"modeling_{name}").apply_rotary_pos_emb is before
    tokens = torch.arange(1, 25)
    plan = Pass((0, 24), attention=PackedCausal([24]))
    logits = runtime.logits(runtime.hidden(tokens, torch.arange(24), plan), plan)
    rounded, exact = (m(input_ids=tokens[None], use_cache=False).logits[0] for m in (plain, deepcopy(plain).double()))
    assert_missed_like(logits, rounded, exact)


def test_what_is_not_fp32_stays_as_it_is() -> None:
    model = make("Llama").double()
    hooks.install(model)
    # Layers can always be recomputed.
    assert _patched(model, "") == _patched(model, "DecoderLayer") == 2


def test_what_computes_otherwise_stays_as_it_is() -> None:
    model = make("Llama")
    norm = model.get_decoder().norm
    own: Callable[[Tensor], Tensor] = norm.forward
    norm.forward = lambda x: own(x) * 1.5
    hooks.install(model)
    x = torch.randn(3, 32)
    assert torch.equal(norm(x), own(x) * 1.5)


def _patched(model: Any, suffix: str) -> int:
    return sum("forward" in vars(m) for m in model.modules() if type(m).__name__.endswith(suffix))
