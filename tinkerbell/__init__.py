"""Tinkerbell: many LoRA adapters fine-tuned at once on one frozen model, every request an event.

A training script imports `tinkerbell.sdk`.
"""

from importlib import metadata

__version__ = metadata.version("tinkerbell-server")
