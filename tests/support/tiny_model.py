"""Tiny random models, for tests that need the real code but not a real model."""

from pathlib import Path
from typing import Any

import torch


def write_tiny_model(directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Save it (hidden 64, 2 layers, 4 heads, 2 key/value heads, vocabulary 257) and return the directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    config = LlamaConfig(**(settings | overrides))
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    finally:
        torch.set_rng_state(state)
    model.save_pretrained(str(directory))
    return directory


def make(family: str, **more: Any) -> Any:
    """A random model of a transformers family (hidden 32, 2 layers, vocabulary 64), in memory."""
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**(settings | more))
        return transformers.AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_rng_state(state)
