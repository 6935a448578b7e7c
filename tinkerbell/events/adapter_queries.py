"""Questions about adapters, and the checkpoints that were saved of them."""

from collections.abc import Collection
from typing import Any

import msgspec
import sqlalchemy as sa

from tinkerbell.events import tables as t
from tinkerbell.events.name_holders import holders
from tinkerbell.events.names import Holders, SavedName
from tinkerbell.events.querying import Querying, columns, with_json
from tinkerbell.events.rows import AdapterRow, CheckpointRow, RecoveryPointRow
from tinkerbell.types import CheckpointUse


class AdapterQueries(Querying):
    """See Queries."""

    def adapter(self, tenant: str, id: str) -> AdapterRow | None:
        """An adapter of the tenant, whatever its state."""
        c = t.adapters.c
        row = self._first(sa.select(*columns(t.adapters, AdapterRow)).where(c.id == id, c.tenant == tenant))
        return msgspec.convert(with_json(row), AdapterRow) if row else None

    def adapters(
        self,
        tenant: str | None = None,
        *,
        after: AdapterRow | None = None,
        offset: int = 0,
        limit: int | None = None,
    ) -> list[AdapterRow]:
        """Adapters of the tenant (of all of them: None) that were made after `after`, oldest first."""
        c = t.adapters.c
        query = sa.select(*columns(t.adapters, AdapterRow)).order_by(c.created_us, c.id)
        if tenant is not None:
            query = query.where(c.tenant == tenant)
        if after is not None:
            query = query.where(sa.tuple_(c.created_us, c.id) > sa.tuple_(*_values(after.created_us, after.id)))
        return self._adapters(query.offset(offset).limit(limit))

    def models(self, tenant: str, *, offset: int = 0, limit: int) -> list[AdapterRow]:
        """The tenant's adapters that are no sampler's, newest first."""
        c = t.adapters.c
        query = sa.select(*columns(t.adapters, AdapterRow)).where(c.tenant == tenant, sa.text(t.MODELS))
        return self._adapters(query.order_by(c.created_us.desc(), c.id.desc()).offset(offset).limit(limit))

    def num_models(self, tenant: str) -> int:
        """How many there are."""
        return self._count(sa.select(sa.func.count()).where(t.adapters.c.tenant == tenant, sa.text(t.MODELS)))

    def models_of(self, tenant: str, session: str) -> list[str]:
        """Ids of the tenant's adapters that a session made and that are no sampler's, oldest first."""
        c = t.adapters.c
        query = sa.select(c.id).where(c.session == session, c.tenant == tenant, sa.text(t.MODELS))
        return [row["id"] for row in self._all(query.order_by(c.created_us, c.id))]

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def checkpoint(self, tenant: str, id: str) -> CheckpointRow | None:
        """A checkpoint of the tenant."""
        c = t.checkpoints.c
        row = self._first(sa.select(*columns(t.checkpoints, CheckpointRow)).where(c.id == id, c.tenant == tenant))
        return msgspec.convert(with_json(row), CheckpointRow) if row else None

    def checkpoints(
        self,
        tenant: str,
        adapter: str | None = None,
        kind: str | None = "save",
        *,
        after: CheckpointRow | None = None,
        offset: int = 0,
        limit: int | None = None,
    ) -> list[CheckpointRow]:
        """Checkpoints of the tenant that were saved after `after`, oldest first; `kind` None: the server's recovery
        points too."""
        c = t.checkpoints.c
        query = sa.select(*columns(t.checkpoints, CheckpointRow)).where(c.tenant == tenant).order_by(c.position)
        if adapter is not None:
            query = query.where(c.adapter == adapter)
        if kind is not None:
            query = query.where(sa.text(t.SAVED) if kind == "save" else c.kind == kind)
        if after is not None:
            query = query.where(c.position > sa.select(c.position).where(c.id == after.id).scalar_subquery())
        return self._checkpoints(query.offset(offset).limit(limit))

    def kept(
        self, tenant: str, at_us: int, *, adapter: str | None = None, offset: int = 0, limit: int | None = None
    ) -> list[CheckpointRow]:
        """What the tenant saved and can use at this time, newest first."""
        c = t.checkpoints.c
        query = sa.select(*columns(t.checkpoints, CheckpointRow)).where(*_listed(tenant, at_us))
        if adapter is not None:
            query = query.where(c.adapter == adapter)
        return self._checkpoints(query.order_by(c.position.desc()).offset(offset).limit(limit))

    def num_kept(self, tenant: str, at_us: int) -> int:
        """How many those are."""
        return self._count(sa.select(sa.func.count()).where(*_listed(tenant, at_us)))

    def storage(self, tenant: str, at_us: int) -> tuple[int, int]:
        """(number, bytes) of all that the tenant saved and can use at this time."""
        c = t.checkpoints.c
        query = sa.select(sa.func.count().label("saved"), _bytes()).where(c.tenant == tenant, *_usable(at_us))
        row = self._first(query)
        assert row is not None
        return row["saved"], row["bytes"]

    def storage_of_sessions(self, sessions: Collection[str], at_us: int) -> dict[str, tuple[int, int]]:
        """Session -> (number, bytes) of what was saved of its adapters and can be used at this time."""
        a, c = t.adapters.c, t.checkpoints.c
        query = (
            sa.select(a.session, sa.func.count().label("saved"), _bytes())
            .join(t.checkpoints, sa.and_(c.tenant == a.tenant, c.adapter == a.id))
            .where(a.session.in_(sessions), *_usable(at_us))
            .group_by(a.session)
        )
        return {row["session"]: (row["saved"], row["bytes"]) for row in self._all(query)}

    def newest_kept(self, adapters: Collection[str], use: CheckpointUse, at_us: int) -> dict[str, CheckpointRow]:
        """Adapter -> the newest checkpoint for this use that `kept` has of it."""
        a, c = t.adapters.c, t.checkpoints.c
        newest = sa.select(c.id).where(
            c.tenant == a.tenant, c.adapter == a.id, c.use == use, *_usable(at_us), _has_a_name()
        )
        newest = newest.order_by(c.position.desc()).limit(1).correlate(t.adapters)
        ids = sa.select(newest.scalar_subquery()).where(a.id.in_(adapters))
        rows = self._checkpoints(sa.select(*columns(t.checkpoints, CheckpointRow)).where(c.id.in_(ids)))
        return {row.adapter: row for row in rows}

    def recovery_points(self) -> list[RecoveryPointRow]:
        """Of all tenants, those that are still there, in no order."""
        c, a = t.checkpoints.c, t.adapters.c
        query = (
            sa.select(c.id, c.tenant, c.adapter, a.state.label("adapter_state"), c.after_seq, c.position, c.blobs)
            .join(t.adapters, a.id == c.adapter)
            .where(sa.text("checkpoints.kind = 'recovery' AND NOT checkpoints.deleted"))
        )
        return [msgspec.convert(with_json(row), RecoveryPointRow) for row in self._all(query)]

    def saved(self, tenant: str, adapter: str, use: CheckpointUse, name: str) -> CheckpointRow | None:
        """The checkpoint of the adapter that was saved for this use under this name; the newest, if none is there that
        was not deleted."""
        c = t.checkpoints.c
        query = sa.select(*columns(t.checkpoints, CheckpointRow)).where(
            c.tenant == tenant, c.adapter == adapter, c.use == use, c.name == name, sa.text(t.SAVED)
        )
        rows = self._checkpoints(query.order_by(c.deleted, c.position.desc()).limit(1))
        return rows[0] if rows else None

    def name_holders(self, name: SavedName) -> Holders:
        """What was not deleted, or is being saved, under this name."""
        with self._engine.connect() as connection:
            return holders(connection, [name])[name]

    def _adapters(self, query: sa.Select[*tuple[Any, ...]]) -> list[AdapterRow]:
        return [msgspec.convert(with_json(row), AdapterRow) for row in self._all(query)]

    def _checkpoints(self, query: sa.Select[*tuple[Any, ...]]) -> list[CheckpointRow]:
        return [msgspec.convert(with_json(row), CheckpointRow) for row in self._all(query)]

    def _count(self, query: sa.Select[*tuple[Any, ...]]) -> int:
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())


def _values(*values: Any) -> list[sa.BindParameter[Any]]:
    return [sa.literal(value) for value in values]


def _usable(at_us: int) -> tuple[sa.ColumnElement[bool], ...]:
    c = t.checkpoints.c
    return sa.text(t.KEPT), sa.or_(c.expires_us.is_(None), c.expires_us > at_us)  # type: ignore[return-value]


def _has_a_name() -> sa.ColumnElement[bool]:
    """That it keeps, or it was saved to train on."""
    c = t.checkpoints.c
    return sa.or_(c.name.is_not(None), c.use == "state")


def _listed(tenant: str, at_us: int) -> tuple[sa.ColumnElement[bool], ...]:
    return t.checkpoints.c.tenant == tenant, *_usable(at_us)


def _bytes() -> sa.Label[int]:
    return sa.cast(sa.func.coalesce(sa.func.sum(t.checkpoints.c.num_bytes), 0), t.Big).label("bytes")
