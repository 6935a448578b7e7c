"""Values at, under and over every limit that a type states, found by walking it: a new limited field is among them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import inspect as mi


@dataclass(frozen=True)
class Varied:
    """A struct with one field, somewhere within it, at another value."""

    field: str
    """As an error names it, without indices: `params.stop`."""
    value: Any
    """Of the field; an element of it where the limit is the element's."""
    struct: msgspec.Struct
    fits: bool


def varied(struct: msgspec.Struct) -> Iterator[Varied]:
    """Every limited field of a struct, and of those it holds, at each of its limits and beyond."""
    for field in msgspec.structs.fields(type(struct)):
        present = getattr(struct, field.name)
        if isinstance(present, msgspec.Struct):
            inner: Iterator[Varied] = varied(present)
        else:
            inner = (Varied("", value, value, fits) for value, fits in _values(mi.type_info(field.type)))  # type: ignore[arg-type]
        for each in inner:
            path = f"{field.name}.{each.field}" if each.field else field.name
            made = msgspec.structs.replace(struct, **{field.name: each.struct})
            yield Varied(path, each.value, made, each.fits)


def _values(type_: mi.Type) -> Iterator[tuple[Any, bool]]:
    """(value, whether it is within the limits)."""
    match type_:
        case mi.UnionType():
            for each in type_.types:
                yield from _values(each)
        case mi.IntType():
            if type_.ge is not None:
                yield from ((type_.ge, True), (type_.ge - 1, False), (-(2**70), False))
            if type_.le is not None:
                yield from ((type_.le, True), (type_.le + 1, False), (2**70, False))
            if type_.lt is not None:
                yield from ((type_.lt - 1, True), (type_.lt, False))
        case mi.FloatType():
            if type_.ge is not None:
                yield from ((float(type_.ge), True), (type_.ge - 0.5, False))
            if type_.gt is not None:
                yield from ((type_.gt + 0.5, True), (float(type_.gt), False))
            if type_.le is not None:
                yield from ((float(type_.le), True), (type_.le * 2 + 1.0, False))
            if type_.lt is not None:
                yield (float(type_.lt), False)
            yield from ((float("nan"), False), (float("inf"), False), (float("-inf"), False))
        case mi.StrType():
            yield from _lengths(type_.min_length, type_.max_length, lambda n: "x" * n)
            yield from (("nul \0", False), ("half a pair \ud800", False))
            if type_.pattern is not None:
                yield from (("", False), ("no name!", False))
        case mi.VarTupleType() | mi.ListType():
            build = tuple if isinstance(type_, mi.VarTupleType) else list
            plain = "x" if isinstance(type_.item_type, mi.StrType) else 1
            yield from _lengths(type_.min_length, type_.max_length, lambda n: build([plain] * n))
            for value, fits in _values(type_.item_type):
                yield build([plain, value]), fits
        case mi.DictType():
            for value, fits in _values(type_.value_type):
                yield {"name": value}, fits
        case _:
            return


def _lengths(least: int | None, most: int | None, build: Any) -> Iterator[tuple[Any, bool]]:
    if least:
        yield from ((build(least), True), (build(least - 1), False))
    if most is not None:
        yield from ((build(most), True), (build(most + 1), False))
