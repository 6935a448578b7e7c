"""Event <-> stored form: canonical JSON, upcasting of old versions, compressed bodies."""

import hashlib
import math
import re
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import zstandard

from tinkerbell.errors import Corrupt, InvalidRequest
from tinkerbell.events.kinds import BODY_OF, AnyEvent, Body, BodyCodec, Event, NewEvent, type_of

INLINE_BYTES = 64 * 1024
"""A stored body longer than this becomes a blob: inline it would delay its neighbours in the group commit."""

VERSION_OF: dict[str, int] = {}
"""Event type -> its present schema_version; a type that is missing has version 1."""

UPCASTERS: dict[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""(type, version) -> pure function from that version's JSON object to the next version's. A new version of an
event needs an entry in VERSION_OF, one here, and the old bytes in the golden files."""

_ESCAPED_NUL = re.compile(r"(?<!\\)(\\\\)*\\u0000")
"""The NUL character as JSON writes it; behind one more backslash it would be six harmless characters."""

Seal = Callable[[bytes], bytes]
"""Encrypts what is about to be stored."""
ENCRYPTED: dict[BodyCodec, BodyCodec] = {"zstd": "zstd+aes256gcm", "msgpack": "msgpack+aes256gcm"}

_encode_json = msgspec.json.Encoder(order="deterministic").encode
_decode_event = msgspec.json.Decoder(AnyEvent).decode
_encode_msgpack = msgspec.msgpack.Encoder(order="deterministic").encode
_body_decoders = {type_: msgspec.msgpack.Decoder(cls) for type_, cls in BODY_OF.items()}


class _Zstd(threading.local):
    """A (de)compression context must not be used by two threads at once."""

    def __init__(self) -> None:
        self.compress = zstandard.ZstdCompressor(level=3).compress
        self.decompress = zstandard.ZstdDecompressor().decompress


_zstd = _Zstd()


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A new event in stored form: all that can be computed before the append transaction."""

    new: NewEvent
    type: str
    schema_version: int
    data: str
    body: bytes | None = None
    """Inline body as stored."""
    body_codec: BodyCodec | None = None
    body_hash: bytes | None = None
    body_len: int | None = None
    blobs: dict[str, bytes]
    """Name -> bytes, a large body included."""

    @property
    def num_bytes(self) -> int:
        """Bytes its row will take, about."""
        return 512 + len(self.data) + len(self.body or b"")


def canonical_json(value: Any) -> str:
    """JSON text with sorted keys and no spaces: equal values give equal bytes."""
    return _encode_json(value).decode()


def prepare(new: NewEvent, seal: Seal | None = None) -> Prepared:
    """Encode an event and its body; `seal` encrypts its body and blobs.

    Raises InvalidRequest for numbers that are not finite and for NUL characters, which not every database can
    hold; TypeError where the body is not the one its type has.
    """
    type_ = type_of(new.event)
    data = encode_event(new.event)
    for text in (new.tenant, new.stream, new.adapter, new.correlation, new.actor, new.idempotency_key):
        if text is not None and "\0" in text:
            raise InvalidRequest("text must not contain NUL characters")
    if new.idempotency_key is not None and new.request_hash is None:
        raise TypeError("an idempotency key needs the hash of its request")
    version = VERSION_OF.get(type_, 1)
    expected = BODY_OF.get(type_)
    if expected is None and new.body is None:
        return Prepared(new=new, type=type_, schema_version=version, data=data, blobs=_sealed(new.blobs, seal))
    if expected is None or not isinstance(new.body, expected):
        raise TypeError(f"{type_} has the body {expected and expected.__name__}, not {type(new.body).__name__}")
    stored, codec, length = encode_body(new.body)
    if seal is not None:
        stored, codec = seal(stored), ENCRYPTED[codec]
    blobs = _sealed(new.blobs, seal)
    inline = len(stored) <= INLINE_BYTES
    return Prepared(
        new=new,
        type=type_,
        schema_version=version,
        data=data,
        body=stored if inline else None,
        body_codec=codec,
        body_hash=hashlib.sha256(stored).digest(),
        body_len=length,
        blobs=blobs if inline else {**blobs, "body": stored},
    )


def _sealed(blobs: dict[str, bytes], seal: Seal | None) -> dict[str, bytes]:
    return {name: data if seal is None else seal(data) for name, data in blobs.items()}


def without_bulk(prepared: Prepared) -> Prepared:
    """The same event without the bytes that are in the blob store by now."""
    return msgspec.structs.replace(prepared, blobs={}, new=msgspec.structs.replace(prepared.new, body=None, blobs={}))


def has_hash(stored: bytes, digest: str | None) -> bool:
    """Whether these are the bytes with this sha256 (hex)."""
    return hashlib.sha256(stored).hexdigest() == digest


def encode_event(event: Event) -> str:
    """Canonical JSON of an event. Raises InvalidRequest where JSON could not give the same event back."""
    data = canonical_json(event)
    if _ESCAPED_NUL.search(data):
        raise InvalidRequest("text must not contain NUL characters")
    # JSON has no NaN and no infinity: they are written as null, and would come back as nothing or not at all.
    if "null" in data and not _is_finite(msgspec.to_builtins(event)):
        raise InvalidRequest(f"{type_of(event)}: every number must be finite")
    return data


def _is_finite(value: Any) -> bool:
    match value:
        case float():
            return math.isfinite(value)
        case dict():
            return all(_is_finite(item) for item in value.values())
        case list() | tuple():
            return all(_is_finite(item) for item in value)
        case _:
            return True


def decode_event(type_: str, version: int, data: str) -> AnyEvent:
    """The event of a row, brought to the present version. Raises Corrupt when this release cannot read it."""
    current = VERSION_OF.get(type_, 1)
    if version == current:
        try:
            event: AnyEvent = _decode_event(data)
            return event
        except msgspec.DecodeError as exc:
            raise Corrupt(f"an event of type {type_} cannot be read: {exc}") from exc
    if version > current:
        raise Corrupt(f"{type_} version {version} was written by a newer release; this one knows {current}")
    try:
        value: dict[str, Any] = msgspec.json.decode(data)
        for old in range(version, current):
            value = UPCASTERS[type_, old](value)
        upcast: AnyEvent = msgspec.convert(value, AnyEvent)
        return upcast
    except (msgspec.MsgspecError, KeyError) as exc:
        raise Corrupt(f"{type_} version {version} cannot be brought to version {current}: {exc}") from exc


def body_bytes(body: Body) -> bytes:
    """MessagePack of a body, without those last fields that are at their defaults: where a new field is not used, the
    bytes are those from before there was one."""
    values, defaults = msgspec.structs.astuple(body), type(body).__struct_defaults__
    required, num_written = len(values) - len(defaults), len(values)
    while num_written > required and values[num_written - 1] == defaults[num_written - 1 - required]:
        num_written -= 1
    return _encode_msgpack(values[:num_written])


def encode_body(body: Body) -> tuple[bytes, BodyCodec, int]:
    """(stored bytes, codec, length before compression). Kept as it is where compressing does not make it smaller."""
    raw = body_bytes(body)
    small = _zstd.compress(raw)
    if len(small) < len(raw):
        return small, "zstd", len(raw)
    return raw, "msgpack", len(raw)


def decode_body(type_: str, codec: str, stored: bytes) -> Body:
    """The body of an event of this type, from its stored bytes, decrypted. Raises Corrupt when they are not one."""
    try:
        raw = _zstd.decompress(stored) if codec.startswith("zstd") else stored
        body: Body = _body_decoders[type_].decode(raw)
    except (zstandard.ZstdError, msgspec.DecodeError, KeyError) as exc:
        raise Corrupt(f"the body of a {type_} cannot be read: {exc}") from exc
    return body
