"""How projections are asked: in a read connection of their own, rows as structs."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy import RowMapping

from tinkerbell.events.rows import Row

R = TypeVar("R", bound=Row)
_EMPTY = {"lora": "", "blobs": "{}", "tags": "[]", "user_metadata": "{}"}
"""Columns of JSON."""


def columns(table: sa.Table, row: type[Row]) -> list[sa.Column[Any]]:
    return [table.c[name] for name in row.__struct_fields__]


def row_of(row: type[R], values: Mapping[Any, Any]) -> R:
    return row(**values)


def with_json(values: RowMapping) -> dict[str, Any]:
    # NULL is an empty one.
    decoded = {name: msgspec.json.decode(values[name] or _EMPTY[name]) for name in _EMPTY if name in values}
    # Names of columns are a subclass of str, which msgspec does not take for one.
    return {str(name): decoded.get(name, value) for name, value in values.items()}


def unindexed(column: sa.Column[str]) -> sa.ColumnElement[str]:
    """The column, where a better index is at hand than one that begins with it and the planner cannot know."""
    return column.concat("")


class Querying:
    """Answers as of the last commit."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def _all(self, query: sa.Select[*tuple[Any, ...]], **values: Any) -> list[RowMapping]:
        with self._engine.connect() as connection:
            return list(connection.execute(query, values).mappings())

    def _first(self, query: sa.Select[*tuple[Any, ...]], **values: Any) -> RowMapping | None:
        rows = self._all(query, **values)
        return rows[0] if rows else None
