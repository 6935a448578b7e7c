"""Applies the folds' changes with SQL, a few statements for a whole group of events."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from tinkerbell.events.projections import KEYS, Add, Change, Key, Put, Row, Set
from tinkerbell.events.tables import PROJECTIONS


class _Pending:
    """All the changes to one row, in one."""

    __slots__ = ("add", "put", "set")

    def __init__(self) -> None:
        self.put: Row | None = None
        self.set: Row = {}
        self.add: Row = {}

    def absorb(self, change: Change) -> None:
        match change:
            case Put():
                self.put, self.set, self.add = dict(change.values), {}, {}
            case Set():
                (self.set if self.put is None else self.put).update(change.values)
            case Add():
                target = self.add if self.put is None else self.put
                for column, value in change.values.items():
                    target[column] = target.get(column, 0) + value


def upsert(connection: sa.Connection, table: sa.Table, rows: list[Row], *, add: bool = False) -> None:
    """Insert rows of equal columns; where a row exists its other columns are replaced, or added to (`add`)."""
    connection.execute(_upsert_statement(connection.dialect.name, table, tuple(rows[0]), add), rows)


# Building a statement costs more than running it: there are a few dozen in all.
@lru_cache(maxsize=256)
def _upsert_statement(dialect: str, table: sa.Table, columns: tuple[str, ...], add: bool) -> sa.Insert:
    insert: Any = (sqlite if dialect == "sqlite" else postgresql).insert(table)
    keys = [column.name for column in table.primary_key]
    changed = {
        column: table.c[column] + insert.excluded[column] if add else insert.excluded[column]
        for column in columns
        if column not in keys
    }
    statement: sa.Insert = insert.on_conflict_do_update(index_elements=keys, set_=changed)
    return statement


def project(connection: sa.Connection, changes: Iterable[Change]) -> None:
    """Apply changes in order, in the caller's transaction."""
    rows: dict[tuple[str, Key], _Pending] = {}
    for change in changes:
        rows.setdefault((change.table, change.key), _Pending()).absorb(change)
    groups: dict[tuple[str, str, tuple[str, ...]], list[Row]] = {}
    for (table, key), pending in rows.items():
        names = dict(zip(KEYS[table], key, strict=True))
        for how, values in (("put", pending.put), ("set", pending.set), ("add", pending.add)):
            if values:
                groups.setdefault((table, how, tuple(sorted(values))), []).append({**names, **values})
    for (name, how, columns), group in groups.items():
        table_ = PROJECTIONS[name]
        if how == "set":
            _update(connection, table_, columns, group)
        else:
            upsert(connection, table_, group, add=how == "add")


def _update(connection: sa.Connection, table: sa.Table, columns: tuple[str, ...], rows: list[Row]) -> None:
    keys = KEYS[table.name]
    bound = [{(f"key_{k}" if k in keys else f"new_{k}"): value for k, value in row.items()} for row in rows]
    connection.execute(_update_statement(table, columns), bound)


@lru_cache(maxsize=256)
def _update_statement(table: sa.Table, columns: tuple[str, ...]) -> sa.Update:
    # Names of bind parameters must differ from those of the columns that change.
    return (
        table.update()
        .where(*(table.c[key] == sa.bindparam(f"key_{key}") for key in KEYS[table.name]))
        .values({column: sa.bindparam(f"new_{column}") for column in columns})
    )
