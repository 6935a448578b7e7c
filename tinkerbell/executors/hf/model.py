"""Loads the base model a server was told to serve and says what callers and auditors need to know of it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from tinkerbell.errors import InvalidRequest, NotFound
from tinkerbell.executors.hf import gguf
from tinkerbell.executors.hf.hooks import install
from tinkerbell.executors.hf.model_hash import model_hash
from tinkerbell.executors.hf.runtime import Runtime
from tinkerbell.types import ModelInfo

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A base model ready to run."""

    runtime: Runtime
    info: ModelInfo
    weights_hash: str
    """sha256 (hex) over names, dtypes, shapes and bytes of all weights and buffers in memory."""


def load(model: str, *, dtype: str = "float32", device: str | None = None) -> LoadedModel:
    """`model`: a directory, a hub id, or `package:NAME` for a GGUF inside an installed package.

    `device`: a torch device, default cuda if there is one. Raises NotFound where there is no such model,
    InvalidRequest where its architecture is not supported, MissingPackage for a package that is not installed.
    """
    from transformers.utils.logging import disable_progress_bar

    if dtype not in DTYPES:
        raise InvalidRequest(f"dtype `{dtype}` is not one of {', '.join(DTYPES)}")
    disable_progress_bar()
    source = locate(model)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    hf_model = _from_pretrained(source, DTYPES[dtype]).to(place)
    # Before anything is installed into it.
    weights_hash, identity = _weights_hash(hf_model), model_hash(hf_model)
    runtime = install(hf_model)
    info = msgspec.structs.replace(_describe(hf_model, source, model, runtime), hash=identity)
    return LoadedModel(runtime=runtime, info=info, weights_hash=weights_hash)


def locate(model: str) -> str:
    """Where transformers finds it: the directory (for a package: of the converted model) or the hub id."""
    if model.startswith("package:"):
        return str(gguf.convert(model.removeprefix("package:")))
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_absolute() or model.startswith(("./", "../", "~")):
        raise NotFound(f"model directory {model} does not exist")
    return model


def _from_pretrained(source: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    except OSError as exc:
        raise NotFound(f"model `{source}` cannot be loaded: {_first_line(exc)}") from exc
    except ValueError as exc:
        raise InvalidRequest(f"model `{source}` is not a causal language model: {_first_line(exc)}") from exc


def _first_line(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0] if lines else type(exc).__name__


def _weights_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _describe(model: Any, source: str, asked: str, runtime: Runtime) -> ModelInfo:
    config = model.config.get_text_config()
    max_length = getattr(config, "max_position_embeddings", None)
    if not isinstance(max_length, int):
        raise InvalidRequest(f"{type(model).__name__} does not say its longest sequence (max_position_embeddings)")
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        # Within one window, windowed attention is plain causal attention.
        if isinstance(window, int):
            max_length = min(max_length, window)
    targets: dict[str, int] = {}
    for name, shape in runtime.shapes.items():
        word = name.rsplit(".", 1)[-1]
        targets[word] = targets.get(word, 0) + shape.in_features + shape.out_features
    return ModelInfo(
        name=Path(source).name if asked != source or Path(source).is_dir() else source,
        vocab_size=runtime.head.out_features,
        max_length=max_length,
        targets=tuple(targets),
        eos_tokens=_eos_tokens(model),
        tokenizer=source,
        parameters_per_rank=targets,
    )


def _eos_tokens(model: Any) -> tuple[int, ...]:
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    if eos is None:
        eos = model.config.eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)
