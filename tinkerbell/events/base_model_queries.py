"""Questions about the base models of adapters."""

import sqlalchemy as sa

from tinkerbell.events import kinds, reading
from tinkerbell.events import tables as t
from tinkerbell.events.base_models import BaseModel, base_model_of
from tinkerbell.events.querying import Querying


class BaseModelQueries(Querying):
    """Answers as of the last commit."""

    def base_model(self, tenant: str, adapter: str) -> BaseModel | None:
        """What an adapter, and so every checkpoint of it, was trained on; None where the log does not say.

        A log of an older release has no hash with the adapter. It is that of the environment in which the adapter was
        made, else of the first one that was recorded after it was asked for.
        """
        c = t.adapters.c
        query = sa.select(c.base_model, c.base_hash, c.checkpoint).where(c.id == adapter, c.tenant == tenant)
        row = self._first(query)
        if row is None:
            return None
        if row["base_hash"]:
            return BaseModel(name=row["base_model"], hash=row["base_hash"])
        position = self._made_in(adapter) or self._first_after(adapter)
        if position is None:
            return None
        with self._engine.connect() as connection:
            event = reading.at_positions(connection, [position])[0].event
        return base_model_of(event) if isinstance(event, kinds.EnvironmentRecorded) else None

    def _made_in(self, adapter: str) -> int | None:
        """Position of the environment that its add_lora ran in."""
        with self._engine.connect() as connection:
            made = reading.page(connection, 0, 1, adapter=adapter, types=["add_lora.completed"])
        if not made or not isinstance(event := made[0].event, kinds.AddLoraCompleted):
            return None
        batches, environments = t.batches.c, t.environments.c
        digest = sa.select(batches.environment).where(batches.id == event.batch).scalar_subquery()
        row = self._first(
            sa.select(sa.func.max(environments.position).label("at")).where(environments.digest == digest)
        )
        return None if row is None else row["at"]

    def _first_after(self, adapter: str) -> int | None:
        with self._engine.connect() as connection:
            begun = reading.page(connection, 0, 1, adapter=adapter)
        if not begun:
            return None
        event, c = begun[0].event, t.environments.c
        if isinstance(event, kinds.CheckpointCopied):
            source = sa.select(t.checkpoints.c.adapter).where(t.checkpoints.c.id == event.source)
            row = self._first(source)
            return None if row is None else self._made_in(row["adapter"]) or self._first_after(row["adapter"])
        after = sa.select(sa.func.min(c.position).label("at")).where(c.position > begun[0].position)
        row = self._first(after)
        return None if row is None else row["at"]
