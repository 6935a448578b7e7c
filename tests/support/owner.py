"""Somebody who may do anything to a database: changes the log behind the store's back, for tests that must notice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from tinkerbell.config import Settings
from tinkerbell.events import tables as t
from tinkerbell.events.chain import link
from tinkerbell.events.engine import make_engine
from tinkerbell.events.vault import Vault


@contextmanager
def as_owner(settings: Settings) -> Iterator[sa.Connection]:
    """A connection of somebody who may do anything: triggers and foreign keys are out of the way, and there again in
    the end."""
    text = {
        "json_serializer": str,
        "json_deserializer": lambda value: value if isinstance(value, str) else value.decode(),
    }
    engine = sa.create_engine(settings.url, poolclass=sa.NullPool, **text)
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET session_replication_role = replica")
        else:
            triggers = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").all()
            for trigger in triggers:
                connection.exec_driver_sql(f"DROP TRIGGER {trigger.name}")
        yield connection
        if connection.dialect.name == "sqlite":
            for trigger in triggers:
                connection.exec_driver_sql(trigger.sql)
    engine.dispose()


def forge(settings: Settings, position: int, **columns: Any) -> None:
    """Change columns of an event, and every hash from there to the end of its stream, so that the chain holds."""
    events = t.events
    with as_owner(settings) as connection:
        connection.execute(events.update().where(events.c.position == position).values(**columns))
        first = connection.execute(sa.select(events).where(events.c.position == position)).mappings().one()
        later = sa.select(events).where(
            events.c.stream == first["stream"], events.c.stream_version >= first["stream_version"]
        )
        prev_hash = first["prev_hash"]
        for row in connection.execute(later.order_by(events.c.stream_version)).mappings().all():
            named = sa.select(t.event_blobs.c.name, t.event_blobs.c.blob_hash)
            of_row = connection.execute(named.where(t.event_blobs.c.position == row["position"]))
            blobs = {each.name: each.blob_hash for each in of_row}
            digest = link(prev_hash, {str(name): value for name, value in row.items()}, blobs)
            values = {"prev_hash": prev_hash, "hash": digest}
            connection.execute(events.update().where(events.c.position == row["position"]).values(**values))
            prev_hash = digest


def decrypted(settings: Settings, stored: bytes) -> bytes:
    """A stored body or blob, with the key file of these settings."""
    engine = make_engine(settings.url, role="reader")
    try:
        return Vault(engine, settings.key_path).open(stored)
    finally:
        engine.dispose()
