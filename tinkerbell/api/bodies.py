"""JSON bodies as the types they should be: counted before they are read, long lists as arrays. Pure.

What a few bytes can ask of a decoder is out of all proportion (`[]` takes 20 times its length), so lists, objects and
numbers are counted in the bytes first.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import msgspec
import numpy as np

from tinkerbell import wire
from tinkerbell.api.tinker import messages as m
from tinkerbell.errors import InvalidRequest, TooLarge, brief
from tinkerbell.types import AdapterId

SMALL_BYTES = 65_536
"""A body up to this is decoded where it is, and is not counted among those under way: connections bound it."""

MAX_DEPTH = 64
"""Lists and objects within one another."""

LIST_WEIGHT = 10
"""A list or an object counts for so many elements: about what it takes in memory."""

MAX_TEXT_BYTES = 4096
"""Of a text in a long body: names and stops are short."""

KINDS: dict[type, str | None] = {
    wire.Forward: "forward",
    wire.ForwardBackward: "forward_backward",
    wire.ForwardBackwardFor: "forward_backward",
    wire.Sample: "sample",
    wire.SampleFor: "sample",
    m.Asample: None,
}
"""Bodies that carry data -> the kind of request by which `/v1` knows a repeated one."""

_NUL = re.compile(rb"(?<!\\)(?:\\\\)*+\\u0000")
_NAME = re.compile(rb'"([A-Za-z_]{1,64})"\s*:')
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class Decoded(msgspec.Struct, frozen=True):
    """A body that carries data."""

    body: Any
    """Lists of numbers are arrays."""
    hashed: bytes | None
    """`request_hash` of it, where it has an idempotency key."""


@cache
def _decoder(target: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(target)


def decode(raw: bytes, target: Any, max_elements: int) -> Any:
    """`raw` as `target`. Raises InvalidRequest that says where it is wrong, TooLarge."""
    _check(raw, max_elements)
    try:
        return _decoder(target).decode(raw)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"body: {brief(str(error))}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {brief(str(error))}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error


def decode_data(
    raw: bytes, target: type, max_elements: int, max_tokens: int, path_id: AdapterId | None, *, keyed: bool
) -> Decoded:
    """`raw` as a `target` of KINDS; `path_id` is the adapter that the path names. Raises as `decode` does, and TooLarge
    over `max_tokens`."""
    body, kind = decode(raw, target, max_elements), KINDS[target]
    check_tokens(_num_tokens(body), max_tokens)
    named = getattr(body, "adapter_id", None) if path_id is None else path_id
    hashed = request_hash(kind, named, raw, max_elements) if keyed and kind is not None else None
    return Decoded(_with_arrays(body), hashed)


def check_tokens(num_tokens: int, max_tokens: int) -> None:
    """Raises TooLarge."""
    if num_tokens > max_tokens:
        raise TooLarge(
            f"The request has {num_tokens} tokens; a request may have {max_tokens}.",
            num_tokens=num_tokens,
            limit=max_tokens,
        )


def request_hash(
    kind: str, path_id: AdapterId | None, raw: bytes, max_elements: int, without: Sequence[str] = ("adapter_id",)
) -> bytes:
    """sha256 over the kind of request, the adapter named by the caller, and the body in canonical JSON.

    The body as the caller sent it, so that neither generated ids nor a new release's defaults change it, less the
    fields `without`: the adapter of an alias's body counts as the path's, so that both ways to ask are one request.
    Raises InvalidRequest where the body is not JSON, TooLarge.
    """
    body: Any = decode(raw, Any, max_elements) if raw else {}
    if isinstance(body, dict):
        for field in without:
            body.pop(field, None)
    canonical = msgspec.json.encode([kind, path_id, body], order="deterministic")
    return hashlib.sha256(canonical).digest()


def _check(raw: bytes, max_elements: int) -> None:
    num_lists = raw.count(b"[") + raw.count(b"{")
    num_elements = raw.count(b",") + LIST_WEIGHT * num_lists
    if num_elements > max_elements:
        raise TooLarge(
            f"The body has about {num_elements} elements, a list or an object counted for {LIST_WEIGHT}; it may have"
            f" {max_elements}.",
            limit=max_elements,
        )
    if num_lists > MAX_DEPTH and _depth(raw) > MAX_DEPTH:
        raise InvalidRequest(f"the body is nested too deeply; {MAX_DEPTH} lists and objects within one another at most")
    if len(raw) > SMALL_BYTES:
        for text in _STRING.finditer(raw):
            if text.end() - text.start() > MAX_TEXT_BYTES + 2:
                raise TooLarge(f"A text in a body of over {SMALL_BYTES} bytes may have {MAX_TEXT_BYTES}.")
    if b"\\u0000" in raw and (nul := _NUL.search(raw)):
        *_, name = [b"", *_NAME.findall(raw[max(nul.start() - MAX_TEXT_BYTES, 0) : nul.start()])]
        where = f"{name.decode()}: " if name else ""
        raise InvalidRequest(f"{where}the body has a text with a NUL character, which nothing here can hold")


def _depth(raw: bytes) -> int:
    """Deepest nesting, of JSON."""
    brackets = _STRING.sub(b"", raw).translate(None, _NO_BRACKETS)
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0)


def _num_tokens(body: Any) -> int:
    match body:
        case wire.ForwardBackward():
            return sum(len(datum.tokens) for datum in body.data)
        case wire.Sample():
            return len(body.prompt)
        case m.Asample():
            return sum(len(chunk.tokens) for chunk in body.prompt.chunks)
        case other:
            raise TypeError(f"{type(other).__name__} carries no data")


def _with_arrays(body: Any) -> Any:
    """The same with arrays for what may be long."""
    match body:
        case wire.ForwardBackward():
            data = [
                wire.DatumBody(
                    tokens=_ints(datum.tokens),
                    targets=_ints(datum.targets),
                    loss_inputs={name: _floats(values) for name, values in datum.loss_inputs.items()},
                )
                for datum in body.data
            ]
            return msgspec.structs.replace(body, data=data)
        case wire.Sample():
            rows = body.prompt_targets
            return msgspec.structs.replace(
                body, prompt=_ints(body.prompt), prompt_targets=None if rows is None else [*map(_ints, rows)]
            )
        case m.Asample():
            chunks = [msgspec.structs.replace(chunk, tokens=_ints(chunk.tokens)) for chunk in body.prompt.chunks]
            tensor = body.target_prompt_logprobs
            if tensor is not None:
                tensor = msgspec.structs.replace(tensor, data=_floats(tensor.data))
            return msgspec.structs.replace(body, prompt=m.Prompt(chunks=chunks), target_prompt_logprobs=tensor)
        case other:
            raise TypeError(f"{type(other).__name__} carries no data")


def _ints(numbers: list[int]) -> Any:
    """[n] int32; ids are below 2^31."""
    return np.asarray(numbers, "<i4")


def _floats(numbers: list[float]) -> Any:
    """[n] float64."""
    return np.asarray(numbers, "<f8")
