"""Parameters of lists."""

from typing import Annotated, TypeVar

from litestar.params import QueryParameter

T = TypeVar("T")

MAX_POSITION = 2**63 - 1
"""Largest position either database can hold."""

Limit = Annotated[int, QueryParameter(ge=1, le=1000, description="Most items to return.")]
Offset = Annotated[int, QueryParameter(ge=0, le=MAX_POSITION, description="Items to skip.")]


def page(items: list[T], limit: int, offset: int) -> list[T]:
    """Items [offset, offset + limit)."""
    return items[offset : offset + limit]
