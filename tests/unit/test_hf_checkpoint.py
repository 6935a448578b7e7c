"""Adapters to files and back, in the format PEFT reads as it is."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch

from tests.support.hf_training import Bench, random_data
from tests.support.peft_reference import quietly
from tests.support.rounding import assert_missed_like
from tests.support.tiny_model import write_tiny_model
from tinkerbell.errors import InvalidRequest
from tinkerbell.executors.hf import checkpoint
from tinkerbell.executors.hf import model as hf_model
from tinkerbell.executors.hf.adapter import Adapter
from tinkerbell.executors.hf.attention import PackedCausal
from tinkerbell.executors.hf.runtime import Pass, RowRange
from tinkerbell.executors.port import AdapterState
from tinkerbell.types import LoraConfig

LORA = LoraConfig(rank=6, alpha=9, targets=("attention", "down_proj", "unembed"))
PREFIX = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(directory: Path) -> hf_model.LoadedModel:
    return hf_model.load(str(directory))


@pytest.fixture
def bench(model: hf_model.LoadedModel) -> Bench:
    """One adapter `a` after two steps."""
    bench = Bench(model)
    bench.add("a", LORA, 1)
    for step in range(2):
        bench.train(bench.unit("a", random_data(step, (20, 9), 257)))
        bench.step("a")
    return bench


def load(bench: Bench, state: AdapterState, with_optimizer: bool = True) -> Adapter:
    runtime = bench.model.runtime
    return checkpoint.load(state, with_optimizer, runtime.shapes, runtime.adapter_dtype, runtime.device)


def test_round_trip_continues_bit_for_bit(bench: Bench) -> None:
    state = checkpoint.save(bench.adapters["a"], "tiny")
    bench.adapters["b"] = load(bench, state)
    assert bench.adapters["b"].digest() == state.digest == bench.adapters["a"].digest()
    data = random_data(7, (15,), 257)
    for name in ("a", "b"):
        bench.train(bench.unit(name, data))
        bench.step(name)
    assert bench.adapters["a"].digest() == bench.adapters["b"].digest() != state.digest
    assert bench.adapters["b"].step == 3


def test_equal_adapters_give_equal_bytes(bench: Bench) -> None:
    state = checkpoint.save(bench.adapters["a"], "tiny")
    assert checkpoint.save(load(bench, state), "tiny") == state


def test_without_the_optimizer_moments_and_steps_start_from_zero(bench: Bench) -> None:
    state = checkpoint.save(bench.adapters["a"], "tiny")
    loaded = load(bench, state, with_optimizer=False)
    assert loaded.step == 0
    assert torch.equal(loaded.weights.flat, bench.adapters["a"].weights.flat)
    assert not loaded.exp_avg.flat.any() and not loaded.exp_avg_sq.flat.any()
    with pytest.raises(InvalidRequest, match="no optimizer state"):
        load(bench, msgspec.structs.replace(state, optimizer=None))


def test_an_adapter_that_takes_no_step_has_memory_for_its_weights_alone(bench: Bench) -> None:
    state = checkpoint.save(bench.adapters["a"], "tiny")
    loaded = load(bench, state, with_optimizer=False)
    weights = loaded.weights.flat.nbytes
    digest = loaded.digest()
    loaded.move(loaded.device)
    assert loaded.num_bytes == weights
    assert loaded.exp_avg.flat.nbytes == weights and loaded.num_bytes == 3 * weights
    assert loaded.digest() == digest, "moments that are there and zero are those that are not there"
    bench.adapters["c"] = load(bench, state, with_optimizer=False)
    bench.train(bench.unit("c", random_data(3, (12,), 257)))
    bench.step("c")
    assert bench.adapters["c"].num_bytes == 3 * weights and bench.adapters["c"].exp_avg.flat.any()


def test_peft_loads_it_as_it_is(bench: Bench, directory: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    state = checkpoint.save(bench.adapters["a"], str(directory))
    (tmp_path / "adapter_model.safetensors").write_bytes(state.weights)
    (tmp_path / "adapter_config.json").write_bytes(state.adapter_config)
    base = AutoModelForCausalLM.from_pretrained(str(directory))
    peft = quietly(PeftModel.from_pretrained, base, str(tmp_path)).eval()
    tokens = torch.arange(3, 20)
    plan = Pass(bounds=(0, 17), ranges=(RowRange(0, 17, bench.adapters["a"]),), attention=PackedCausal([17]))
    runtime = bench.model.runtime
    with torch.no_grad():
        expected = peft(input_ids=tokens[None]).logits[0]
        exact = deepcopy(peft).double()(input_ids=tokens[None]).logits[0]
        with peft.disable_adapter():
            without = peft(input_ids=tokens[None]).logits[0]
        found = runtime.logits(runtime.hidden(tokens, torch.arange(17), plan), plan)
    assert_missed_like(found, expected, exact)
    assert (found - without).abs().max() > 1e-3, "the adapter changes nothing: the comparison is empty"
    config = json.loads(state.adapter_config)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (6, 9, "LORA")
    assert config["target_modules"] == ["down_proj", "k_proj", "lm_head", "o_proj", "q_proj", "v_proj"]


def test_peft_saves_what_we_load(bench: Bench, directory: Path, tmp_path: Path) -> None:
    """The other direction: an adapter trained elsewhere."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(directory))
    config = PeftConfig(r=6, lora_alpha=9, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft = quietly(get_peft_model, base, config)
    quietly(peft.save_pretrained, str(tmp_path))
    lora = LoraConfig(rank=6, alpha=9, targets=("q_proj", "v_proj"))
    state = AdapterState(
        lora=lora, step=0, optimizer=None, digest="",
        weights=(tmp_path / "adapter_model.safetensors").read_bytes(),
        adapter_config=(tmp_path / "adapter_config.json").read_bytes(),
    )  # fmt: skip
    loaded = load(bench, state, with_optimizer=False)
    expected = dict(peft.named_parameters())[PREFIX.replace(".weight", ".default.weight")]
    assert torch.equal(loaded.weights.pairs["model.layers.1.self_attn.q_proj"].A, expected)


def changed(state: AdapterState, field: str, **tensors: torch.Tensor | None) -> AdapterState:
    """`state` with tensors replaced (None: removed)."""
    found = safetensors.torch.load(getattr(state, field))
    found.update({name: tensor for name, tensor in tensors.items() if tensor is not None})
    for name, tensor in tensors.items():
        if tensor is None:
            del found[name]
    return msgspec.structs.replace(state, **{field: safetensors.torch.save(found)})


@pytest.mark.parametrize(
    ("field", "tensors", "text"),
    [
        ("weights", {PREFIX: None}, "is missing"),
        ("weights", {"base_model.model.other.lora_A.weight": torch.zeros(1)}, "does not belong"),
        ("weights", {PREFIX: torch.zeros(5, 64)}, r"is \[5, 64\], not \[6, 64\]"),
        ("weights", {PREFIX: torch.full((6, 64), torch.nan)}, "not finite"),
        ("optimizer", {f"{PREFIX}.exp_avg": None}, "is missing"),
        ("optimizer", {"step": torch.tensor([7])}, "step count"),
        ("optimizer", {"step": None}, "step count"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    bench: Bench, field: str, tensors: dict[str, torch.Tensor | None], text: str
) -> None:
    state = changed(checkpoint.save(bench.adapters["a"], "tiny"), field, **tensors)
    with pytest.raises(InvalidRequest, match=text):
        load(bench, state)


@pytest.mark.parametrize("data", [b"", b"12345678", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0nonsense"])
def test_garbage_is_refused(bench: Bench, data: bytes) -> None:
    state = msgspec.structs.replace(checkpoint.save(bench.adapters["a"], "tiny"), weights=data)
    with pytest.raises(InvalidRequest, match="not a safetensors file"):
        load(bench, state)


def test_a_checkpoint_of_another_model_is_refused(bench: Bench, tmp_path: Path) -> None:
    other = Bench(hf_model.load(str(write_tiny_model(tmp_path, num_hidden_layers=1))))
    state = checkpoint.save(bench.adapters["a"], "tiny")
    with pytest.raises(InvalidRequest, match="does not belong"):
        load(other, state)


# ---- merged by PEFT --------------------------------------------------------------------------------------------------


def written(directory: Path, state: AdapterState) -> str:
    """The directory of a downloaded checkpoint."""
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(state.weights)
    (directory / "adapter_config.json").write_bytes(state.adapter_config)
    return str(directory)


@pytest.mark.parametrize("tied", [False, True])
def test_it_merges_as_the_how_to_says(tmp_path: Path, tied: bool) -> None:
    """The base model is found by what the checkpoint says; on a tied head the adapter merges once that is untied."""
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    base = write_tiny_model(tmp_path, tie_word_embeddings=tied)
    bench = Bench(hf_model.load(str(base)))
    bench.add("a", LORA, 1, b_scale=0.05)
    state = checkpoint.save(bench.adapters["a"], bench.model.info.tokenizer)
    adapter = written(tmp_path / "mine", state)
    tokens = torch.arange(3, 20)[None]

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model.eval().double()(input_ids=tokens).logits[0]
        return found

    expected = logits(quietly(AutoPeftModelForCausalLM.from_pretrained, adapter))
    plain = quietly(AutoPeftModelForCausalLM.from_pretrained, adapter).double()
    right = torch.allclose(logits(quietly(plain.merge_and_unload)), expected)
    assert right != tied, "where that is no more so, the how-to has nothing to say"

    untied = AutoModelForCausalLM.from_pretrained(str(base)).double()
    head = untied.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    untied.config.tie_word_embeddings = False
    merged = quietly(quietly(PeftModel.from_pretrained, untied, adapter).merge_and_unload)
    assert torch.allclose(logits(merged), expected)
    merged.save_pretrained(str(tmp_path / "merged"))
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.float64)
    assert torch.allclose(logits(again), expected)
