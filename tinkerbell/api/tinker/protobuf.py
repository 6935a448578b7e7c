"""Protobuf bodies, decompressed and counted before they are parsed.

A few bytes of either can ask for any amount of memory: 5 KB of zstd are 50 MB, and an empty message of two bytes takes
some 60 once it is parsed.
"""

from typing import cast

import zstandard
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from tinkerbell.api.tinker import wire_pb2 as pb
from tinkerbell.errors import InvalidRequest, TooLarge

MAX_FIELDS = 100_000
"""Of a request, those of the messages in it included. A datum with its loss inputs has about 25; the SDK sends 1,024
data at most."""

MANY = 4096
SMALL_BYTES = 8
"""A message with more than MANY fields of fewer bytes on the average is none that anybody needs; it is refused before
all of them are counted. A chunk of one token has 10."""

UNCOUNTED_BYTES = 1024 * 1024
"""What a body up to this can ask for is little enough: some 30 times as much."""

WINDOW_BYTES = 8 * 1024 * 1024
"""The largest window of zstd's ordinary levels."""

MAX_TEXT_BYTES = 4096

_STEP_BYTES = 1024
"""Compressed, at a time, of a frame that does not say how long it will be: at most 32 MiB come of them."""

_UNKNOWN = (1 << 64) - 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def decompress(raw: bytes, max_bytes: int) -> bytes:
    """A zstd body: its frames joined. Raises InvalidRequest for what is not whole, or has something behind it;
    TooLarge over `max_bytes`."""
    # As large as the longest body there may be: more would be memory for nothing.
    window = max(WINDOW_BYTES, 1 << max(max_bytes - 1, 1).bit_length())
    decompressor = zstandard.ZstdDecompressor(max_window_size=window)
    parts: list[bytes] = []
    num_bytes, rest = 0, memoryview(raw)
    try:
        while rest or not parts:
            known = zstandard.get_frame_parameters(rest).content_size
            if known != _UNKNOWN and num_bytes + known > max_bytes:
                raise _too_large(max_bytes)
            frame, step = decompressor.decompressobj(), _STEP_BYTES if known == _UNKNOWN else len(rest)
            while not frame.eof:
                if not rest:
                    raise InvalidRequest("the body is not zstd: its last frame is not finished")
                piece = frame.decompress(rest[:step])
                rest = rest[min(step, len(rest)) - len(frame.unused_data) :]
                num_bytes += len(piece)
                if num_bytes > max_bytes:
                    raise _too_large(max_bytes)
                parts.append(piece)
    except zstandard.ZstdError as error:
        raise InvalidRequest(f"the body is not zstd: {error}") from error
    return b"".join(parts)


def forward_backward(raw: bytes) -> pb.ForwardBackwardRequest:
    """Raises InvalidRequest, TooLarge."""
    request = pb.ForwardBackwardRequest()
    try:
        if len(raw) > UNCOUNTED_BYTES:
            _count(raw, cast("Descriptor", request.DESCRIPTOR))
        request.ParseFromString(raw)
    except (DecodeError, IndexError) as error:
        raise InvalidRequest(f"the body is no ForwardBackwardRequest: {error}") from error
    return request


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"The body may have at most {max_bytes} bytes.", limit=max_bytes)


def _count(raw: bytes, message: Descriptor) -> None:
    """Raises TooLarge for more than MAX_FIELDS, DecodeError or IndexError for what is no message."""
    fields: dict[Descriptor, dict[int, FieldDescriptor]] = {}
    left, todo = MAX_FIELDS, [(0, len(raw), message)]
    while todo:
        at, end, within = todo.pop()
        begin, left_before = at, left
        if within not in fields:
            fields[within] = dict(within.fields_by_number)
        known = fields[within]
        while at < end:
            tag, at = _varint(raw, at)
            field, wire = known.get(tag >> 3), tag & 7
            left -= 1
            if wire == _VARINT:
                _, at = _varint(raw, at)
            elif wire == _FIXED64:
                at += 8
            elif wire == _FIXED32:
                at += 4
            elif wire == _BYTES:
                size, at = _varint(raw, at)
                if field is None:
                    pass
                elif field.type == FieldDescriptor.TYPE_MESSAGE:
                    todo.append((at, at + size, cast("Descriptor", field.message_type)))
                elif field.type == FieldDescriptor.TYPE_STRING:
                    if size > MAX_TEXT_BYTES:
                        raise TooLarge(f"{field.name} has {size} bytes; it may have {MAX_TEXT_BYTES}.")
                elif field.type != FieldDescriptor.TYPE_BYTES:
                    left -= size  # packed numbers, of a byte each or more
                at += size
            else:
                raise DecodeError(f"field {tag >> 3} has the wire type {wire}")
            if at > end:
                raise DecodeError("it is truncated")
            num_fields = left_before - left
            if left < 0 or (num_fields > MANY and at - begin < SMALL_BYTES * num_fields):
                raise TooLarge(
                    f"The request has more than {MAX_FIELDS} fields, those of its data included, or many that are"
                    " nearly empty; send fewer data at a time.",
                    limit=MAX_FIELDS,
                )


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    byte = raw[at]
    if byte < 0x80:
        return byte, at + 1
    number, shift = byte & 0x7F, 7
    while byte >= 0x80:
        at += 1
        byte = raw[at]
        number |= (byte & 0x7F) << shift
        shift += 7
        if shift > 70:
            raise DecodeError("a number has too many bytes")
    return number, at + 1
