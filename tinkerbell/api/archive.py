"""Checkpoints as tar archives of PEFT directories, one file in memory at a time."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import PurePath

import msgspec

from tinkerbell.errors import Corrupt
from tinkerbell.events.rows import CheckpointRow

MEDIA_TYPE = "application/x-tar"
OPTIMIZER = "optimizer.safetensors"
CONFIG = "adapter_config.json"
_BASE = "base_model_name_or_path"
_PEFT_FILES = {CONFIG: "adapter_config", "adapter_model.safetensors": "weights"}
"""Name in a PEFT directory -> name of the blob."""

_CHUNK_BYTES = 256 * 1024
_BLOCK_BYTES = tarfile.BLOCKSIZE
END = bytes(2 * _BLOCK_BYTES)
"""A tar ends with two empty blocks."""


def files_of(row: CheckpointRow, *, with_optimizer: bool) -> dict[str, str]:
    """File name -> hash of its blob. Raises Corrupt where PEFT's files are missing."""
    files = {}
    for name, blob in _PEFT_FILES.items():
        if blob not in row.blobs:
            raise Corrupt(f"checkpoint {row.id} has no {blob}")
        files[name] = row.blobs[blob]
    if with_optimizer and "optimizer" in row.blobs:
        files[OPTIMIZER] = row.blobs["optimizer"]
    return files


def shown(file: str, content: bytes, *, here: bool) -> bytes:
    """What is handed out of a file. A base model in a directory of the server is named by its path only to callers who
    are `here`, on its machine; others get the directory's name, and put in its place where they have that model."""
    if file != CONFIG or here:
        return content
    config = msgspec.json.decode(content)
    base = config.get(_BASE) if isinstance(config, dict) else None
    if not isinstance(base, str) or not PurePath(base).is_absolute():
        return content
    return json.dumps(config | {_BASE: PurePath(base).name}, indent=2, sort_keys=True).encode()


def entry(path: str, content: bytes, *, at_us: int) -> Iterator[bytes]:
    """Header, content in chunks and padding of one file; the same bytes every time."""
    info = tarfile.TarInfo(path)
    info.size, info.mtime, info.mode = len(content), at_us // 1_000_000, 0o644
    yield info.tobuf(tarfile.PAX_FORMAT)
    view = memoryview(content)
    for start in range(0, len(content), _CHUNK_BYTES):
        yield bytes(view[start : start + _CHUNK_BYTES])
    yield bytes(-len(content) % _BLOCK_BYTES)
