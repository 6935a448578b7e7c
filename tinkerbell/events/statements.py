"""Statements of the append transaction: built with SQLAlchemy, compiled once, run on the driver's own connection.

Every transaction has a dozen statements, for one event as for hundreds. SQLAlchemy's way through a connection costs
ten times what most of them take in the database. And SQLite's driver gives up the interpreter lock for each row of an
`executemany`, so that other threads stand between any two rows: there, rows enter many to a statement.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import psycopg
from sqlalchemy.dialects.sqlite import pysqlite

T = TypeVar("T")
Row = Mapping[str, Any]
OnConflict = Literal["fail", "ignore", "replace", "add"]
"""What an insert does where the key is taken: fail, nothing, replace the other columns, or add to them."""
Database = Literal["sqlite", "postgresql"]

ROWS_AT_ONCE = 64
"""Most rows of one INSERT in SQLite, which takes 32,766 parameters; a power of two."""

# Parameters by place: both drivers take them as a plain list.
_DIALECTS: dict[Database, sa.Dialect] = {
    "sqlite": pysqlite.dialect(),
    "postgresql": psycopg.dialect(paramstyle="format"),  # type: ignore[no-untyped-call]
}


class Lookup:
    """The rows with given keys: values of one column, or tuples of several."""

    def __init__(self, keys: Sequence[sa.Column[Any]], columns: Sequence[sa.Column[Any]]) -> None:
        self._num_keys = len(keys)
        key = keys[0] if len(keys) == 1 else sa.tuple_(*keys)
        query = sa.select(*columns)
        self.texts: dict[Database, str] = {
            "sqlite": _compile("sqlite", query.where(key.in_(_rows_of_json(len(keys)))))[0],
            "postgresql": _compile("postgresql", query.where(key.in_(_rows_of_arrays(keys))))[0],
        }
        """SQL by database. The parameters are an array of each key's values; for SQLite one array in JSON."""

    def parameters(self, database: Database, keys: Collection[Any]) -> list[Any]:
        """For the SQL of this database."""
        if database == "sqlite":
            return [msgspec.json.encode(list(keys)).decode()]
        return [list(keys)] if self._num_keys == 1 else [list(values) for values in zip(*keys, strict=True)]


def _rows_of_json(num_keys: int) -> sa.Select[Any]:
    value = sa.func.json_each(sa.bindparam("keys", type_=sa.Text)).table_valued("value").c.value
    if num_keys == 1:
        return sa.select(value)
    return sa.select(*(sa.func.json_extract(value, sa.literal_column(f"'$[{index}]'")) for index in range(num_keys)))


def _rows_of_arrays(keys: Sequence[sa.Column[Any]]) -> sa.Select[Any]:
    arrays = [sa.bindparam(key.name, type_=postgresql.ARRAY(key.type)) for key in keys]
    rows = sa.func.unnest(*arrays).table_valued(*(key.name for key in keys)).render_derived(name="given")
    return sa.select(*rows.c)


class Statements:
    """Runs statements in the transaction of a connection. What they raise is the driver's own error."""

    def __init__(self, connection: sa.Connection) -> None:
        self.database: Database = "sqlite" if connection.dialect.name == "sqlite" else "postgresql"
        self._driver: Any = connection.connection.driver_connection

    def scalar(self, query: sa.Select[Any]) -> Any:
        """The first column of the first row of a query without parameters; None when there is no row."""
        row = self._driver.execute(_text(self.database, query)).fetchone()
        return None if row is None else row[0]

    def look_up(self, lookup: Lookup, keys: Collection[Any]) -> list[tuple[Any, ...]]:
        """The rows with these keys, in any order."""
        if not keys:
            return []
        parameters = lookup.parameters(self.database, keys)
        rows: list[tuple[Any, ...]] = self._driver.execute(lookup.texts[self.database], parameters).fetchall()
        return rows

    def insert(self, table: sa.Table, rows: Sequence[Row], on_conflict: OnConflict = "fail") -> None:
        """Insert rows that have the same columns, and no key twice."""
        columns = _columns(table, rows)
        if self.database == "sqlite":
            for part in _parts(rows):
                text = _insert(self.database, table, columns, on_conflict, len(part))
                self._driver.execute(text, [row[column] for row in part for column in columns])
        else:
            self._many(_insert(self.database, table, columns, on_conflict, 1), columns, rows)

    def update(self, table: sa.Table, rows: Sequence[Row]) -> None:
        """In the rows with these keys set the other columns; all of `rows` have the same columns."""
        text, columns = _update(self.database, table, _columns(table, rows))
        self._many(text, columns, rows)

    def _many(self, text: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        parameters = [[row[column] for column in columns] for row in rows]
        if len(parameters) == 1:
            self._driver.execute(text, parameters[0])
        else:
            self._driver.cursor().executemany(text, parameters)


def _columns(table: sa.Table, rows: Sequence[Row]) -> tuple[str, ...]:
    """Names of the rows' columns, in the order of the table."""
    return tuple(name for name in table.columns.keys() if name in rows[0])  # noqa: SIM118 - it has columns, not names


def _parts(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """The rows in parts of ROWS_AT_ONCE, then of smaller powers of two: few different statements."""
    start = 0
    while rest := len(rows) - start:
        size = min(ROWS_AT_ONCE, 1 << rest.bit_length() - 1)
        yield rows[start : start + size]
        start += size


def _compile(database: Database, statement: sa.ClauseElement) -> tuple[str, tuple[str, ...]]:
    """SQL, and the names of its parameters in the order of their places."""
    compiled: Any = statement.compile(dialect=_DIALECTS[database])
    return str(compiled), tuple(compiled.positiontup)


@lru_cache
def _text(database: Database, query: sa.Select[Any]) -> str:
    return _compile(database, query)[0]


@lru_cache(maxsize=512)
def _insert(
    database: Database, table: sa.Table, columns: tuple[str, ...], on_conflict: OnConflict, num_rows: int
) -> str:
    """SQL. Its parameters are the columns of the first row, those of the second, and so on."""
    names = [{column: f"{column}_{row}" for column in columns} for row in range(num_rows)]
    values: Any = [
        {column: sa.bindparam(name, type_=table.c[column].type) for column, name in row.items()} for row in names
    ]
    insert: Any = (sqlite if database == "sqlite" else postgresql).insert(table).values(values)
    keys = [column.name for column in table.primary_key]
    if on_conflict == "ignore":
        insert = insert.on_conflict_do_nothing()
    elif on_conflict != "fail":
        changed = {
            column: table.c[column] + insert.excluded[column] if on_conflict == "add" else insert.excluded[column]
            for column in columns
            if column not in keys
        }
        insert = insert.on_conflict_do_update(index_elements=keys, set_=changed)
    text, places = _compile(database, insert)
    assert places == tuple(name for row in names for name in row.values())
    return text


@lru_cache(maxsize=512)
def _update(database: Database, table: sa.Table, columns: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """SQL, and the columns that its parameters are."""
    keys = [column.name for column in table.primary_key]
    # A parameter of an UPDATE must not be named like a column that it changes.
    column_of = {f"new_{column}": column for column in columns if column not in keys}
    values: Any = {column: sa.bindparam(name, type_=table.c[column].type) for name, column in column_of.items()}
    where = [table.c[key] == sa.bindparam(key, type_=table.c[key].type) for key in keys]
    text, places = _compile(database, table.update().where(*where).values(values))
    return text, tuple(column_of.get(name, name) for name in places)
