"""Event <-> stored form: canonical JSON, upcasting of old versions, compressed bodies."""

import hashlib
import math
import re
import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import msgspec
import zstandard

from tinkerbell.errors import Corrupt, InvalidRequest, UserError
from tinkerbell.events.kinds import BODY_OF, AnyEvent, AnyRead, Body, BodyCodec, Event, NewEvent, Unreadable, type_of

EVENT_BYTES = 512
"""What the row of an event takes besides its JSON and its body, about."""
INLINE_BYTES = 64 * 1024
"""A stored body longer than this becomes a blob: inline it would delay its neighbours in the group commit."""

MAX_BODY_BYTES = 2**30
"""Of a body before compression, far beyond what a request or a result may have."""

VERSION_OF: dict[str, int] = {}
"""Event type -> its present schema_version; a type that is missing has version 1."""

UPCASTERS: dict[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""(type, version) -> pure function from that version's JSON object to the next version's. A new version of an
event needs an entry in VERSION_OF, one here, and the old bytes in the golden files."""

_ESCAPED_NUL = re.compile(r"(?<!\\)(\\\\)*\\u0000")
"""The NUL character as JSON writes it; behind one more backslash it would be six harmless characters."""

_UNWRITABLE = (OverflowError, UnicodeEncodeError, RecursionError, msgspec.DecodeError)
"""What encoding a value, or decoding it again, raises for what JSON or MessagePack cannot hold."""

Seal = Callable[[bytes], bytes]
"""Encrypts what is about to be stored."""
ENCRYPTED: dict[BodyCodec, BodyCodec] = {"zstd": "zstd+aes256gcm", "msgpack": "msgpack+aes256gcm"}

_encode_json = msgspec.json.Encoder(order="deterministic").encode
_decode_event = msgspec.json.Decoder(AnyEvent).decode
_encode_msgpack = msgspec.msgpack.Encoder(order="deterministic").encode


@cache
def _body_decoder(cls: type[Body]) -> msgspec.msgpack.Decoder[Body]:
    return msgspec.msgpack.Decoder(cls)


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
        return EVENT_BYTES + len(self.data) + len(self.body or b"")


def canonical_json(value: Any) -> str:
    """JSON text with sorted keys and no spaces: equal values give equal bytes."""
    return _encode_json(value).decode()


def prepare(new: NewEvent, seal: Seal | None = None) -> Prepared:
    """Encode an event and its body; `seal` encrypts its body and blobs. The one place where anything becomes what is
    written: what could not be read back does not get through it.

    Raises InvalidRequest for that, for numbers that are not finite and for text that not every database can hold;
    TypeError where the body is not the one its type has.
    """
    type_ = type_of(new.event)
    data = encode_event(new.event)
    for name in ("tenant", "stream", "adapter", "correlation", "actor", "idempotency_key"):
        if (text := getattr(new, name)) is not None and not _is_storable(text):
            raise InvalidRequest(f"{name}: text must be Unicode without NUL characters")
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


def _is_storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _sealed(blobs: dict[str, bytes], seal: Seal | None) -> dict[str, bytes]:
    return {name: data if seal is None else seal(data) for name, data in blobs.items()}


def without_bulk(prepared: Prepared) -> Prepared:
    """The same event without the bytes that are in the blob store by now."""
    return msgspec.structs.replace(prepared, blobs={}, new=msgspec.structs.replace(prepared.new, body=None, blobs={}))


def has_hash(stored: bytes, digest: str | None) -> bool:
    """Whether these are the bytes with this sha256 (hex)."""
    return hashlib.sha256(stored).hexdigest() == digest


def encode_event(event: Event) -> str:
    """Canonical JSON of an event. Raises InvalidRequest, which names the field, where it would not be read back as the
    same event: nothing built an event in code checks the limits of its fields, only decoding does."""
    try:
        data = canonical_json(event)
        # JSON has no NaN and no infinity: they are written as null, which is another event, or none.
        back = _decode_event(data)
    except RecursionError as exc:
        raise InvalidRequest(f"{type_of(event)} is nested too deeply") from exc
    except _UNWRITABLE as exc:
        _refuse_unwritable(event)
        if isinstance(exc, msgspec.ValidationError):
            raise out_of_limits(exc) from exc
        raise InvalidRequest(f"{type_of(event)} cannot be written: {exc}") from exc
    if back != event or ("\\u0000" in data and _ESCAPED_NUL.search(data)):
        _refuse_unwritable(event)
        # A list stands for a tuple: the same to who reads it.
        if canonical_json(back) != data:
            raise InvalidRequest(f"{type_of(event)} would be read back as another event than was written")
    return data


def out_of_limits(error: msgspec.ValidationError, where: str = "", names: Mapping[str, str] | None = None) -> UserError:
    """What a field may not be, in the words of whoever sent it: `params.stop[0]: Expected ...`.

    `where`: the place of the value in the request; `names`: field -> as it is called there.
    """
    what, _, path = str(error).partition(" - at `$")
    path = path.removesuffix("`").removeprefix(".")
    first = re.match(r"\w*", path)
    assert first is not None
    path = (names or {}).get(first[0], first[0]) + path[first.end() :]
    field = f"{where}.{path}" if where and path and path[0] != "[" else where + path
    return InvalidRequest(f"{field}: {what}" if field else what)


def _refuse_unwritable(value: Any, path: str = "") -> None:
    """Raise InvalidRequest that names the first number that is not finite, or the first text that cannot be stored."""
    match value:
        case msgspec.Struct():
            for name, item in msgspec.structs.asdict(value).items():
                _refuse_unwritable(item, f"{path}.{name}" if path else name)
        case float() if not math.isfinite(value):
            raise InvalidRequest(f"{path} is {value}; every number must be finite")
        case str() if not _is_storable(value):
            raise InvalidRequest(f"{path}: text must be Unicode without NUL characters")
        case dict():
            for key, item in value.items():
                _refuse_unwritable(key, f"a name in {path}")
                _refuse_unwritable(item, f"{path}.{key}")
        case list() | tuple():
            for index, item in enumerate(value):
                _refuse_unwritable(item, f"{path}[{index}]")
        case _:
            pass


def read_event(type_: str, version: int, data: str) -> AnyRead:
    """The event of a row, whatever is in it: one that this release cannot read is no reason not to read the others."""
    try:
        return decode_event(type_, version, data)
    except Corrupt as exc:
        return Unreadable(type_=type_, why=exc.detail, num_tokens=_num_tokens(data))


def _num_tokens(data: str) -> int:
    try:
        found = msgspec.json.decode(data, type=_Tokens).num_tokens
    except (TypeError, ValueError, RecursionError):
        return 0
    return found if 0 <= found < 1 << 63 else 0


class _Tokens(msgspec.Struct):
    """What can be read of a request that cannot be read as a whole."""

    num_tokens: int = 0


def decode_event(type_: str, version: int, data: str) -> AnyEvent:
    """The event of a row, brought to the present version. Raises Corrupt when this release cannot read it."""
    current = VERSION_OF.get(type_, 1)
    if version == current:
        try:
            event: AnyEvent = _decode_event(data)
        except (TypeError, ValueError, RecursionError) as exc:
            raise Corrupt(f"an event of type {type_} cannot be read: {exc}") from exc
        if type_of(event) != type_:
            raise Corrupt(f"an event of type {type_} says that it is a {type_of(event)}")
        return event
    if version > current:
        raise Corrupt(f"{type_} version {version} was written by a newer release; this one knows {current}")
    try:
        value: dict[str, Any] = msgspec.json.decode(data)
        for old in range(version, current):
            value = UPCASTERS[type_, old](value)
        upcast: AnyEvent = msgspec.convert(value, AnyEvent)
        return upcast
    except (TypeError, ValueError, KeyError, RecursionError) as exc:
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
    """(stored bytes, codec, length before compression). Kept as it is where compressing does not make it smaller.

    Raises InvalidRequest where it could not be read back.
    """
    try:
        raw = body_bytes(body)
        # Arrays are copied, not looked at: a twentieth of what compressing them costs.
        _body_decoder(type(body)).decode(raw)
    except msgspec.ValidationError as exc:
        raise out_of_limits(exc, "body") from exc
    except (*_UNWRITABLE, ValueError) as exc:
        raise InvalidRequest(f"the body cannot be written: {exc}") from exc
    small = _zstd.compress(raw)
    if len(small) < len(raw):
        return small, "zstd", len(raw)
    return raw, "msgpack", len(raw)


def _decompress(stored: bytes) -> bytes:
    """Raises Corrupt for what would become longer than any body: memory is taken for what it says of itself."""
    length = zstandard.frame_content_size(stored)
    if not 0 <= length <= MAX_BODY_BYTES:
        raise Corrupt(f"a body says that it has {length} bytes; the longest has {MAX_BODY_BYTES}")
    return _zstd.decompress(stored)


def decode_body(type_: str, codec: str, stored: bytes) -> Body:
    """The body of an event of this type, from its stored bytes, decrypted. Raises Corrupt when they are not one."""
    try:
        raw = _decompress(stored) if codec.startswith("zstd") else stored
        body: Body = _body_decoder(BODY_OF[type_]).decode(raw)
    except (zstandard.ZstdError, KeyError, ValueError, RecursionError) as exc:
        raise Corrupt(f"the body of a {type_} cannot be read: {exc}") from exc
    return body
