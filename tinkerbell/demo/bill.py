"""The bill, straight from the server's SQLite file with SQL that anybody can type."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

BILL = """\
SELECT tenant, num_requests, tokens_in, tokens_out, accelerator_s, share
FROM audit_costs ORDER BY accelerator_s DESC"""

PASSES = """\
SELECT lane, COUNT(*) AS batches, AVG(num_requests) AS requests_per_batch, SUM(busy_us) / 1e6 AS busy_s
FROM audit_batches WHERE state = 'ran' GROUP BY lane ORDER BY busy_s DESC"""


class Answer(msgspec.Struct, frozen=True):
    """A query and its rows."""

    sql: str
    columns: list[str]
    rows: list[list[Any]]


def ask(database: Path, sql: str) -> Answer:
    """Run one query on the file, opened read-only; the server may be running."""
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        cursor = connection.execute(sql)
        columns = [column[0] for column in cursor.description]
        return Answer(sql, columns, [list(row) for row in cursor.fetchall()])
