"""Checkpoints as tar archives of PEFT directories, one file in memory at a time."""

import tarfile
from collections.abc import Iterator

from tinkerbell.errors import Corrupt
from tinkerbell.events.rows import CheckpointRow

MEDIA_TYPE = "application/x-tar"
OPTIMIZER = "optimizer.safetensors"
_PEFT_FILES = {"adapter_config.json": "adapter_config", "adapter_model.safetensors": "weights"}
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


def entry(path: str, content: bytes, *, at_us: int) -> Iterator[bytes]:
    """Header, content in chunks and padding of one file; the same bytes every time."""
    info = tarfile.TarInfo(path)
    info.size, info.mtime, info.mode = len(content), at_us // 1_000_000, 0o644
    yield info.tobuf(tarfile.PAX_FORMAT)
    view = memoryview(content)
    for start in range(0, len(content), _CHUNK_BYTES):
        yield bytes(view[start : start + _CHUNK_BYTES])
    yield bytes(-len(content) % _BLOCK_BYTES)
