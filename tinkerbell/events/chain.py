"""The hash chain of a stream: each event's hash covers the one before it and every column that means something."""

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

GENESIS = bytes(32)
"""prev_hash of a stream's first event."""

HASHED = (
    "position",
    "stream",
    "stream_version",
    "type",
    "schema_version",
    "tenant",
    "adapter",
    "seq",
    "causation",
    "correlation",
    "actor",
    "idempotency_key",
    "request_hash",
    "data",
    "body_codec",
    "body_hash",
    "body_len",
    "num_blobs",
    "fence_resource",
    "fence_epoch",
    "created_us",
)
"""Columns under the hash, in this order. The body is covered by body_hash; prev_hash and hash are the chain."""


def _part(value: Any) -> bytes:
    """One value with a mark of its kind and its length: no two lists of values have the same bytes."""
    match value:
        case None:
            return b"\0"
        case int():
            kind, raw = b"i", str(value).encode()
        case str():
            kind, raw = b"s", value.encode()
        case bytes():
            kind, raw = b"b", value
        case _:
            raise TypeError(f"{type(value).__name__} cannot be hashed")
    return kind + struct.pack(">Q", len(raw)) + raw


def link(prev_hash: bytes, row: Mapping[Any, Any], blobs: Mapping[str, bytes]) -> bytes:
    """sha256 over the previous hash [32], the HASHED columns of `row`, and (name, hash) of the blobs by name.

    `data` is the stored JSON text.
    """
    parts = [prev_hash, *(_part(row[column]) for column in HASHED)]
    for name in sorted(blobs):
        parts += [_part(name), _part(blobs[name])]
    return hashlib.sha256(b"".join(parts)).digest()
