"""The hash chain of a stream: each event's hash covers the one before it and every column that means something."""

import hashlib
import operator
from collections.abc import Mapping
from typing import Any

import msgspec

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

_columns = operator.itemgetter(*HASHED)
_encode = msgspec.msgpack.Encoder().encode


def link(prev_hash: bytes, row: Mapping[Any, Any], blobs: Mapping[str, bytes]) -> bytes:
    """sha256 over the MessagePack array of the previous hash [32], the HASHED columns of `row`, and the blobs as
    an array of (name, hash) by name.

    MessagePack marks every value with its kind and length, so no two events have the same bytes. `data` is the stored
    JSON text.
    """
    return hashlib.sha256(_encode((prev_hash, *_columns(row), sorted(blobs.items())))).digest()
