"""Whether the database still has what the migrations gave it (I17): a trigger that is gone guards nothing, and nobody
sees it in the rows.

What it should have is what the same migrations give in an empty database now: in memory for SQLite, in a schema that is
rolled back for Postgres.
"""

import re
import secrets

import sqlalchemy as sa

from tinkerbell.errors import Corrupt
from tinkerbell.events import schema

Parts = dict[tuple[str, str], str]
"""(kind, name) -> definition."""

GUARDS = ("trigger", "rule")
"""What must not be there beside what the migrations gave; a table or an index more is its owner's business."""

_SQLITE = "SELECT type AS kind, name, sql AS definition FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"

_POSTGRES = """
SELECT 'column' AS kind, c.relname || '.' || a.attname AS name,
       format_type(a.atttypid, a.atttypmod) || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
       || coalesce(' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), '') AS definition
  FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE c.relnamespace = :schema ::regnamespace AND c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped
UNION ALL
SELECT 'constraint', c.relname || '.' || k.conname, pg_get_constraintdef(k.oid)
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
 WHERE c.relnamespace = :schema ::regnamespace AND k.contype <> 'n'
UNION ALL
SELECT 'index', i.relname, pg_get_indexdef(i.oid) || CASE WHEN x.indisvalid THEN '' ELSE ' INVALID' END
  FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid WHERE i.relnamespace = :schema ::regnamespace
UNION ALL
SELECT 'trigger', c.relname || '.' || t.tgname, pg_get_triggerdef(t.oid) || ' ENABLED ' || CAST(t.tgenabled AS text)
  FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
 WHERE c.relnamespace = :schema ::regnamespace AND NOT t.tgisinternal
UNION ALL
SELECT 'view', c.relname, pg_get_viewdef(c.oid) FROM pg_class c
 WHERE c.relnamespace = :schema ::regnamespace AND c.relkind = 'v'
UNION ALL
SELECT 'rule', r.tablename || '.' || r.rulename, r.definition FROM pg_rules r
 WHERE CAST(CAST(r.schemaname AS text) AS regnamespace) = :schema ::regnamespace AND r.rulename <> '_RETURN'
UNION ALL
SELECT 'function', p.proname, pg_get_functiondef(p.oid)
  FROM pg_proc p WHERE p.pronamespace = :schema ::regnamespace AND p.prokind = 'f' AND p.proname LIKE 'tinkerbell%'
"""


def check_schema(engine: sa.Engine) -> int:
    """How many tables, columns, constraints, indexes, triggers and views are as the migrations give them.

    Raises Corrupt naming what is missing, changed, or there without them. Writes nothing. On Postgres the role must be
    allowed to make a schema in the database.
    """
    with engine.connect() as connection:
        transaction = connection.begin()
        try:
            return compare(connection)
        finally:
            transaction.rollback()


def compare(connection: sa.Connection) -> int:
    """The same within a transaction, which has to be rolled back."""
    found, expected = _sqlite(connection) if connection.dialect.name == "sqlite" else _postgres(connection)
    wrong = [f"{kind} {name} is missing" for kind, name in expected.keys() - found.keys()]
    wrong += [f"{' '.join(key)} was changed" for key, text in expected.items() if found.get(key, text) != text]
    wrong += [f"{kind} {name} was added" for kind, name in found.keys() - expected.keys() if kind in GUARDS]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise Corrupt(
            f"I17: the schema is not what the migrations make: {'; '.join(sorted(wrong)[:5])}{more}", invariant="I17"
        )
    return len(expected)


def _sqlite(connection: sa.Connection) -> tuple[Parts, Parts]:
    memory = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    try:
        with memory.begin() as scratch:
            schema.migrate(scratch)
            return _parts(connection, _SQLITE), _parts(scratch, _SQLITE)
    finally:
        memory.dispose()


def _postgres(connection: sa.Connection) -> tuple[Parts, Parts]:
    ours = str(connection.execute(sa.text("SELECT current_schema()")).scalar_one())
    found = _parts(connection, _POSTGRES, ours)
    name = f"tinkerbell_check_{secrets.token_hex(4)}"
    connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    connection.exec_driver_sql(f"SET LOCAL search_path TO {name}")
    schema.migrate(connection)
    return found, _parts(connection, _POSTGRES, name)


def _parts(connection: sa.Connection, query: str, of_schema: str | None = None) -> Parts:
    values = {} if of_schema is None else {"schema": of_schema}
    rows = connection.execute(sa.text(query), values).all()
    return {(row.kind, row.name): _plain(row.definition or "", of_schema) for row in rows}


def _plain(definition: str, of_schema: str | None) -> str:
    """Without what does not matter: white space, quotes, and the name of the schema."""
    if of_schema is not None:
        definition = re.sub(rf'\b"?{re.escape(of_schema)}"?\.', "", definition)
    return re.sub(r'[\s"`]+', " ", definition).strip()
