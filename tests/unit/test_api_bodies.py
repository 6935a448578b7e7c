"""Bodies are counted before they are read, and what is read elsewhere is what would be read here."""

import json
import os
import signal
import struct
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import zstandard

from tests.support.tinker_driver import message
from tinkerbell import wire
from tinkerbell.api import bodies, decoders
from tinkerbell.api.decoders import Decoders, Job
from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker import protobuf
from tinkerbell.errors import InvalidRequest, TinkerbellError, TooLarge, Unavailable

MOST = 3_000_000
DATUM = {"tokens": [1, 2, 3], "targets": [2, 3, 2**31 - 1], "loss_inputs": {"weights": [1, 0.25, 1e300]}}
CHUNKS = {"chunks": [{"type": "encoded_text", "tokens": [4, 5]}, {"type": "encoded_text", "tokens": []}]}
BODIES: dict[type, dict[str, Any]] = {
    wire.ForwardBackward: {"data": [DATUM, DATUM], "loss": {"name": "ppo", "config": {"x": 1}}, "seq": 4},
    wire.ForwardBackwardFor: {"data": [DATUM], "adapter_id": "ad_x"},
    wire.Forward: {"data": [DATUM], "outputs": {"top_k": 3}},
    wire.Sample: {"prompt": [1, 2], "prompt_targets": [[1, -1], [3, 4]], "params": {"stop": ["é\\u0000x"]}},
    wire.SampleFor: {"prompt": [1, 2]},
    m.Asample: {
        "sampling_session_id": "x",
        "seq_id": 1,
        "prompt": CHUNKS,
        "sampling_params": {"stop": [1, 2]},
        "target_prompt_logprobs": {"data": [1, 2, 3], "dtype": "int64", "shape": [1, 3]},
    },
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Decoders]:
    made = Decoders()
    yield made
    made.close()


def elsewhere(pool: Decoders, target: type, raw: bytes, **changes: Any) -> bodies.Decoded:
    job = Job(target=target.__name__, max_elements=MOST, max_tokens=1000, path_id=None, keyed=True)
    return pool._decode(msgspec.structs.replace(job, **changes), raw)


def plain(value: Any) -> Any:
    """Arrays as lists."""
    return msgspec.to_builtins(value, enc_hook=lambda array: array.tolist())


def test_every_body_with_data_has_an_example() -> None:
    assert set(BODIES) == set(bodies.KINDS)


@pytest.mark.parametrize("target", BODIES)
def test_what_is_decoded_elsewhere_is_the_same(pool: Decoders, target: type) -> None:
    raw = json.dumps(BODIES[target]).encode()
    decoded = elsewhere(pool, target, raw)
    assert isinstance(decoded.body, target)
    assert msgspec.convert(plain(decoded.body), target) == bodies.decode(raw, target, MOST)
    kind, named = bodies.KINDS[target], BODIES[target].get("adapter_id")
    assert decoded.hashed == (None if kind is None else bodies.request_hash(kind, named, raw, MOST))
    if kind is not None:
        other_order = json.dumps(dict(reversed(BODIES[target].items())), indent=1).encode()
        assert elsewhere(pool, target, other_order).hashed == decoded.hashed
        in_path = elsewhere(pool, target, raw, path_id="ad_y")
        assert in_path.hashed == bodies.request_hash(kind, "ad_y", raw, MOST) != decoded.hashed


@pytest.mark.parametrize("target", BODIES)
def test_tokens_are_counted_before_arrays_are_made(pool: Decoders, target: type) -> None:
    with pytest.raises(TooLarge, match="tokens; a request may have 1"):
        elsewhere(pool, target, json.dumps(BODIES[target]).encode(), max_tokens=1)


def test_long_lists_come_as_arrays(pool: Decoders) -> None:
    body = elsewhere(pool, wire.ForwardBackward, json.dumps(BODIES[wire.ForwardBackward]).encode()).body
    assert isinstance(body.data[0].tokens, np.ndarray)
    assert body.data[0].tokens.dtype == np.int32


BAD: dict[str, tuple[bytes, type[TinkerbellError], str]] = {
    "no json": (b'{"data":', InvalidRequest, "the body is not JSON"),
    "another type": (b'{"data":[{"tokens":["x"],"targets":[1]}]}', InvalidRequest, "Expected `int`, got `str`"),
    "deep": (b'{"x":' + b"[" * 65 + b"]" * 65 + b"}", InvalidRequest, "nested too deeply"),
    "deep without an end": (b"[" * 1000, InvalidRequest, "nested too deeply"),
    "many lists": (b"[" + b"[]," * 300_000 + b"[]]", TooLarge, "elements"),
    "many numbers": (b"[" + b"1," * MOST + b"1]", TooLarge, "elements"),
    "NUL": (b'{"data":[],"x":"\\\\\\u0000"}', InvalidRequest, "NUL"),
    "a long name": (b'{"' + b"x" * 5000 + b'":1}', InvalidRequest, "unknown field `" + "x" * 99 + "..."),
    "a long text": (b'{"x":"' + b"y" * 70_000 + b'"}', TooLarge, "may have 4096"),
    "a long number": (b'{"seq":' + b"9" * 60_000 + b',"data":[]}', InvalidRequest, ""),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_said_in_few_words(pool: Decoders, what: str) -> None:
    raw, error, words = BAD[what]
    with pytest.raises(error) as here:
        bodies.decode(raw, wire.ForwardBackward, MOST)
    assert words in here.value.detail
    assert len(here.value.detail) < 400
    with pytest.raises(error) as there:
        elsewhere(pool, wire.ForwardBackward, raw)
    assert there.value.detail == here.value.detail
    assert there.value.extra == here.value.extra


def test_depth_is_not_what_stands_in_a_text() -> None:
    text = '[{"' * 100 + "\\\\"
    assert bodies.decode(json.dumps({"x": [text, {}]}).encode(), Any, MOST) == {"x": [text, {}]}
    nested: Any = 1
    for _ in range(bodies.MAX_DEPTH):
        nested = [nested]
    assert bodies.decode(json.dumps(nested).encode(), Any, MOST) == nested


def test_a_process_that_dies_is_followed_by_another(pool: Decoders) -> None:
    raw = json.dumps(BODIES[wire.Sample]).encode()
    elsewhere(pool, wire.Sample, raw)
    for process in list(pool._idle):
        os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match="could not be decoded"):
        elsewhere(pool, wire.Sample, raw)
    while pool._idle:
        with pytest.raises(Unavailable):
            elsewhere(pool, wire.Sample, raw)
    assert elsewhere(pool, wire.Sample, raw).body.prompt.tolist() == [1, 2]


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "PATIENCE_S", 1.0)
    made = Decoders()
    try:
        process = made._take()
        os.kill(process._process.pid, signal.SIGSTOP)
        made._idle.append(process)
        with pytest.raises(Unavailable):
            elsewhere(made, wire.Sample, b"{}")
        assert process._process.returncode == -signal.SIGKILL
    finally:
        made.close()


# ---- zstd, protobuf ------------------------------------------------------------------------------------------------

CONTENT = os.urandom(1000) * 500


def frame(content: bytes, *, known: bool = True) -> bytes:
    made = zstandard.ZstdCompressor(write_content_size=known)
    if known:
        return made.compress(content)
    stream = made.compressobj()
    return stream.compress(content) + stream.flush()


@pytest.mark.parametrize("known", [True, False])
def test_frames_are_joined(known: bool) -> None:
    halves = frame(CONTENT[:1234], known=known) + frame(CONTENT[1234:], known=not known)
    assert protobuf.decompress(halves, len(CONTENT)) == CONTENT
    assert protobuf.decompress(frame(b"", known=known), 10) == b""


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda raw: raw[:-1], InvalidRequest),
        (lambda raw: raw[: len(raw) // 2], InvalidRequest),
        (lambda raw: raw[:3], InvalidRequest),
        (lambda raw: b"", InvalidRequest),
        (lambda raw: raw + b"\0", InvalidRequest),
        (lambda raw: raw + b"garbage that is no frame", InvalidRequest),
        (lambda raw: raw + raw[:-4], InvalidRequest),
        (lambda raw: raw + raw + raw, TooLarge),
    ],
)
def test_what_is_not_whole_frames_is_refused(known: bool, change: Any, error: type[TinkerbellError]) -> None:
    with pytest.raises(error):
        protobuf.decompress(change(frame(CONTENT, known=known)), 2 * len(CONTENT))


def test_a_window_larger_than_any_body_is_refused() -> None:
    params = zstandard.ZstdCompressionParameters(window_log=24, write_content_size=False)
    made = zstandard.ZstdCompressor(compression_params=params).compressobj()
    raw = made.compress(CONTENT) + made.flush()
    with pytest.raises(InvalidRequest, match="zstd"):
        protobuf.decompress(raw, 1000)


def field(number: int, content: bytes) -> bytes:
    """Of the wire format: a message, text or bytes."""
    size, length = b"", len(content)
    while length > 0x7F:
        size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


COUNT = protobuf.MAX_FIELDS + 1
MANY = {
    "data": field(3, b"") * COUNT,
    "data that are not empty": field(3, field(1, field(1, field(1, b"1234")))) * COUNT,
    "chunks": field(3, field(1, b"") * COUNT),
    "loss inputs": field(3, field(2, b"") * COUNT),
    "spans": field(3, field(3, b"") * COUNT),
    "shape": field(3, field(2, field(2, field(4, b"\1" * COUNT)))),
    "shape, a field for each": field(3, field(2, field(2, b"\x20\1" * COUNT))),
    "settings of the loss": field(7, b"") * COUNT,
    "a long name": field(4, b"x" * 5000),
}


@pytest.mark.parametrize("what", MANY)
def test_a_message_is_counted_before_it_is_parsed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protobuf, "UNCOUNTED_BYTES", 0)
    monkeypatch.setattr(protobuf.pb, "ForwardBackwardRequest", _Unparsed)
    with pytest.raises(TooLarge):
        protobuf.forward_backward(MANY[what])


class _Unparsed:
    DESCRIPTOR = protobuf.pb.ForwardBackwardRequest.DESCRIPTOR

    def ParseFromString(self, raw: bytes) -> None:
        raise AssertionError("it was parsed")


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff",
        b"\xff" * 20,
        field(3, b"\x0a\x05a"),
        b"\x1a\x05",
        b"\x1b",
        field(3, b"x") + b"\x09\1",
        b"\x1a\xff\xff\xff\xff\x7f",
    ],
)
def test_what_is_no_message_is_refused(raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for uncounted in (0, protobuf.UNCOUNTED_BYTES):
        monkeypatch.setattr(protobuf, "UNCOUNTED_BYTES", uncounted)
        with pytest.raises(InvalidRequest, match="no ForwardBackwardRequest"):
            protobuf.forward_backward(raw)


def test_an_honest_message_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protobuf, "UNCOUNTED_BYTES", 0)
    made = message("model", 1, tokens=3)
    made.data.add().model_input.add().encoded_text.tokens = struct.pack("<200i", *range(200))
    made.loss_fn_config["x"] = 1.5
    made.loss_fn_config_v2["x"].number = 1.5
    assert protobuf.forward_backward(made.SerializeToString()) == made
