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


_length = struct.Struct(">Q").pack


def _part(value: Any) -> bytes:
    """One value with a mark of its kind and its length: no two lists of values have the same bytes."""
    # The kinds are compared directly because this runs some twenty times for every event.
    raw: bytes
    kind = type(value)
    if value is None:
        return b"\0"
    if kind is str:
        raw = value.encode()
        return b"s" + _length(len(raw)) + raw
    if kind is int:
        raw = b"%d" % value
        return b"i" + _length(len(raw)) + raw
    if kind is bytes:
        raw = value
        return b"b" + _length(len(raw)) + raw
    raise TypeError(f"{kind.__name__} cannot be hashed")


def link(prev_hash: bytes, row: Mapping[Any, Any], blobs: Mapping[str, bytes]) -> bytes:
    """sha256 over the previous hash [32], the HASHED columns of `row`, and (name, hash) of the blobs by name.

    `data` is the stored JSON text.
    """
    parts = [prev_hash, *(_part(row[column]) for column in HASHED)]
    for name in sorted(blobs):
        parts += [_part(name), _part(blobs[name])]
    return hashlib.sha256(b"".join(parts)).digest()
