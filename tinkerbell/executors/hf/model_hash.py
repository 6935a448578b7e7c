"""Names a base model by what it computes: the same on every machine, under every name and release of transformers."""

import hashlib
from typing import Any

import msgspec
import torch

DECISIVE = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "sliding_window",
    "layer_types",
    "partial_rotary_factor",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "num_experts_per_tok",
    "norm_topk_prob",
)
"""Fields of a config that decide what the same weights compute. All of them would name more than that: releases of
transformers add fields and write down defaults."""
DIGITS = 32


def model_hash(model: Any) -> str:
    """`<dtype>-<exact>-<rounded>`: digests over names, shapes and values of the parameters as they are loaded, and over
    the values rounded to bfloat16. A file that is loaded with two dtypes gives the same second one."""
    exact, rounded = (hashlib.sha256(_config(model.config.get_text_config())) for _ in range(2))
    parameters = sorted(model.named_parameters())
    for name, tensor in parameters:
        described = f"{name} {tuple(tensor.shape)}\n".encode()
        values = tensor.detach().cpu().contiguous().view(-1)
        for digest, held in ((exact, values), (rounded, values.to(torch.bfloat16))):
            digest.update(described)
            digest.update(held.view(torch.uint8).numpy().data)
    dtype = str(parameters[0][1].dtype).removeprefix("torch.")
    return f"{dtype}-{exact.hexdigest()[:DIGITS]}-{rounded.hexdigest()[:DIGITS]}"


def _config(config: Any) -> bytes:
    found = {name: getattr(config, name, None) for name in DECISIVE}
    return msgspec.json.encode({**found, "rope": _rope(config)}, order="sorted", enc_hook=str)


def _rope(config: Any) -> dict[str, Any]:
    """Rotary settings, which releases of transformers keep in several places; what is a default is left out."""
    rope = dict(getattr(config, "rope_scaling", None) or {})
    rope |= dict(getattr(config, "rope_parameters", None) or {})
    rope.setdefault("rope_theta", getattr(config, "rope_theta", None))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    return {"type": kind, **{name: value for name, value in rope.items() if name != "type" and value is not None}}
