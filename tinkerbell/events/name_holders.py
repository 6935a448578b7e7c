"""Reads which checkpoints have a name, or will have it."""

from collections.abc import Collection

import sqlalchemy as sa

from tinkerbell.events import kinds
from tinkerbell.events.names import Holder, Holders, SavedName, name_of
from tinkerbell.events.reading import at_positions
from tinkerbell.events.tables import PENDING, checkpoints, futures


def holders(connection: sa.Connection, names: Collection[SavedName]) -> dict[SavedName, Holders]:
    """Those of each name that were not deleted, and those that are being saved under it."""
    found: dict[SavedName, Holders] = {name: {} for name in names}
    if not found:
        return found
    c, f = checkpoints.c, futures.c
    adapters = {name.adapter for name in found}
    saved = sa.select(c.id, c.adapter, c.use, c.name, c.expires_us).where(
        c.adapter.in_(adapters), c.name.in_({name.name for name in found}), c.kind == "save", c.deleted.is_(False)
    )
    for id_, adapter, use, name, expires_us in connection.execute(saved):
        if (key := SavedName(adapter, use, name)) in found:
            found[key][id_] = Holder(saved=True, expires_us=expires_us)
    asked = sa.select(f.id).where(f.adapter.in_(adapters), f.kind == "save", sa.text(PENDING))
    for recorded in at_positions(connection, connection.execute(asked).scalars().all()):
        wanted = name_of(recorded.event, recorded.adapter)
        if wanted in found and isinstance(recorded.event, kinds.SaveRequested):
            found[wanted][recorded.event.checkpoint] = Holder(saved=False, expires_us=None)
    return found
