"""Which architectures are taken and which are refused, and by what name."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_model import make, write_tiny_model
from tinkerbell.errors import InvalidRequest
from tinkerbell.executors.hf import hooks
from tinkerbell.executors.hf import model as hf_model


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16}),
        ("Mistral", {"sliding_window": 20}),
        ("Gemma", {"head_dim": 16, "pad_token_id": 0}),
        ("Phi3", {"pad_token_id": 0}),
        ("Phi3", {"pad_token_id": 0, "partial_rotary_factor": 0.5}),
        ("Granite", {"residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
        ("Olmo2", {}),
    ],
)
def test_families_that_fit(family: str, more: dict[str, Any]) -> None:
    """`install` compares the packed pass with transformers' own, so success is agreement."""
    model = make(family, **more)
    runtime = hooks.install(model)
    assert "lm_head" in runtime.shapes
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("family", "more", "text"),
    [
        ("Mixtral", {"num_local_experts": 2}, r"module `model\.layers\.0\.mlp"),
        ("GPT2", {"n_embd": 32, "n_head": 4, "n_layer": 1}, r"`transformer\.h\.0\.attn\.c_attn` is a Conv1D"),
        ("Cohere", {"pad_token_id": 0, "logit_scale": 0.5}, "`logit_scale` = 0.5"),
        ("Granite", {"logits_scaling": 8.0}, "`logits_scaling` = 8.0"),
        ("Gemma2", {"head_dim": 8, "pad_token_id": 0, "query_pre_attn_scalar": 8}, "softcap"),
    ],
)
def test_families_that_do_not_fit(family: str, more: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        hooks.install(make(family, **more))


def test_a_wrong_scale_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at loading must be able to fail."""
    from tinkerbell.executors.hf.attention import PackedCausal

    honest = PackedCausal.attend

    def off(self: PackedCausal, layer: int, query: Any, key: Any, value: Any, scale: float) -> Any:
        return honest(self, layer, query, key, value, scale * 2)

    directory = write_tiny_model(tmp_path)
    monkeypatch.setattr(PackedCausal, "attend", off)
    with pytest.raises(InvalidRequest, match="differs from transformers' by"):
        hf_model.load(str(directory))


def test_a_sliding_window_bounds_the_longest_sequence(tmp_path: Path) -> None:
    make("Mistral", sliding_window=20).save_pretrained(str(tmp_path))
    assert hf_model.load(str(tmp_path)).info.max_length == 20
