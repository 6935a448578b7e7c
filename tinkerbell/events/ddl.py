"""What tables are made of besides SQLAlchemy's own parts, the same on SQLite and Postgres."""

from typing import Any

import sqlalchemy as sa
from sqlalchemy import Index, LargeBinary


class RawBytes(LargeBinary):
    """Bytes that go to the driver as they are: both take bytes, and wrapping them costs as much as the insert."""

    def bind_processor(self, dialect: Any) -> None:
        """None to wrap them in."""


def partial_index(name: str, *columns: str, where: str) -> Index:
    """An index of the rows that meet a condition; a query that repeats the condition uses it."""
    return Index(name, *columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
