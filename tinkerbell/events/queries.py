"""Read-only questions to the projections. Whatever belongs to a tenant is asked for with the tenant."""

import msgspec
import sqlalchemy as sa

from tinkerbell.events import kinds, reading
from tinkerbell.events import tables as t
from tinkerbell.events.base_model_queries import BaseModelQueries
from tinkerbell.events.querying import columns, row_of, with_json
from tinkerbell.events.rows import (
    AdapterRow,
    AnsweredRow,
    CheckpointRow,
    FutureRow,
    KeyRow,
    TenantRow,
)
from tinkerbell.events.session_queries import SessionQueries
from tinkerbell.events.usage_queries import UsageQueries
from tinkerbell.types import SYSTEM_TENANT, CheckpointUse

# What every request asks is built once: building a statement costs more than running it.
_FUTURE = sa.select(*columns(t.futures, FutureRow)).where(
    t.futures.c.id == sa.bindparam("id"), t.futures.c.tenant == sa.bindparam("tenant")
)
_PENDING_COUNT = sa.select(
    sa.func.count().label("requests"),
    sa.cast(sa.func.coalesce(sa.func.sum(t.futures.c.num_tokens), 0), t.Big).label("tokens"),
).where(t.futures.c.tenant == sa.bindparam("tenant"), sa.text(t.PENDING))
_PLACE = sa.select(sa.func.count().label("before")).where(
    t.futures.c.tenant == sa.bindparam("tenant"), t.futures.c.id < sa.bindparam("id"), sa.text(t.PENDING)
)
_TENANT = sa.select(*columns(t.tenants, TenantRow)).where(t.tenants.c.tenant == sa.bindparam("tenant"))
_NEWEST_ENVIRONMENT = sa.select(sa.func.max(t.environments.c.position))


class Queries(BaseModelQueries, SessionQueries, UsageQueries):
    """Answers as of the last commit."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self._environment: tuple[int, kinds.EnvironmentRecorded] | None = None

    # ---- requests --------------------------------------------------------------------------------------------------

    def future(self, tenant: str, id: int) -> FutureRow | None:
        """A request of the tenant."""
        row = self._first(_FUTURE, id=id, tenant=tenant)
        return row_of(FutureRow, row) if row else None

    def pending(self, tenant: str | None = None) -> list[FutureRow]:
        """Requests without an answer, by position."""
        query = sa.select(*columns(t.futures, FutureRow)).where(sa.text(t.PENDING)).order_by(t.futures.c.id)
        if tenant is not None:
            query = query.where(t.futures.c.tenant == tenant)
        return [row_of(FutureRow, row) for row in self._all(query)]

    def pending_count(self, tenant: str) -> tuple[int, int]:
        """(requests, tokens) of the tenant that wait for their answer."""
        row = self._first(_PENDING_COUNT, tenant=tenant)
        assert row is not None
        return row["requests"], row["tokens"]

    def place(self, tenant: str, id: int) -> int:
        """How many pending requests of the tenant were accepted before this one."""
        row = self._first(_PLACE, tenant=tenant, id=id)
        assert row is not None
        return int(row["before"])

    def states(self, adapter: str, kind: str) -> list[str]:
        """States of the adapter's requests of this kind, oldest first."""
        c = t.futures.c
        query = sa.select(c.state).where(c.adapter == adapter, c.kind == kind).order_by(c.id)
        return [row["state"] for row in self._all(query)]

    def last_request_us(self, adapter: str) -> int | None:
        """When the newest request of the adapter was accepted."""
        c = t.futures.c
        query = sa.select(c.created_us).where(c.adapter == adapter).order_by(c.id.desc()).limit(1)
        row = self._first(query)
        return int(row["created_us"]) if row else None

    def answered_samples(self, tenant: str, key_prefix: str, after: int, until: int, limit: int) -> list[AnsweredRow]:
        """The tenant's samples with such an idempotency key whose answers lie in (after, until], in order of these."""
        request, result = t.events.alias("request"), t.events.alias("result")
        query = (
            sa.select(
                request.c.position.label("id"),
                request.c.idempotency_key,
                result.c.position.label("result_position"),
                result.c.body_len.label("num_bytes"),
                t.futures.c.state,
            )
            .join(request, request.c.position == result.c.causation)
            .join(t.futures, t.futures.c.id == request.c.position)
            .where(result.c.tenant == tenant, result.c.position > after, result.c.position <= until)
            .where(t.futures.c.kind == "sample", t.futures.c.result_position == result.c.position)
            .where(request.c.idempotency_key.startswith(key_prefix, autoescape=True))
            .order_by(result.c.position)
            .limit(limit)
        )
        return [row_of(AnsweredRow, row) for row in self._all(query)]

    # ---- adapters and checkpoints ------------------------------------------------------------------------------------

    def adapter(self, tenant: str, id: str) -> AdapterRow | None:
        """An adapter of the tenant, whatever its state."""
        c = t.adapters.c
        row = self._first(sa.select(*columns(t.adapters, AdapterRow)).where(c.id == id, c.tenant == tenant))
        return msgspec.convert(with_json(row), AdapterRow) if row else None

    def adapters(self, tenant: str | None = None) -> list[AdapterRow]:
        """Adapters of the tenant (of all of them: None), oldest first."""
        query = sa.select(*columns(t.adapters, AdapterRow)).order_by(t.adapters.c.created_us, t.adapters.c.id)
        if tenant is not None:
            query = query.where(t.adapters.c.tenant == tenant)
        return [msgspec.convert(with_json(row), AdapterRow) for row in self._all(query)]

    def checkpoint(self, tenant: str, id: str) -> CheckpointRow | None:
        """A checkpoint of the tenant."""
        c = t.checkpoints.c
        row = self._first(sa.select(*columns(t.checkpoints, CheckpointRow)).where(c.id == id, c.tenant == tenant))
        return msgspec.convert(with_json(row), CheckpointRow) if row else None

    def checkpoints(self, tenant: str, adapter: str | None = None, kind: str | None = "save") -> list[CheckpointRow]:
        """Checkpoints of the tenant, oldest first; `kind` None: the server's recovery points too."""
        c = t.checkpoints.c
        query = sa.select(*columns(t.checkpoints, CheckpointRow)).where(c.tenant == tenant).order_by(c.position)
        if adapter is not None:
            query = query.where(c.adapter == adapter)
        if kind is not None:
            query = query.where(c.kind == kind)
        return [msgspec.convert(with_json(row), CheckpointRow) for row in self._all(query)]

    def saved(self, tenant: str, adapter: str, use: CheckpointUse, name: str) -> CheckpointRow | None:
        """The newest checkpoint of the adapter that was saved for this use under this name."""
        c = t.checkpoints.c
        query = (
            sa.select(*columns(t.checkpoints, CheckpointRow))
            .where(c.tenant == tenant, c.adapter == adapter, c.kind == "save", c.use == use, c.name == name)
            .order_by(c.position.desc())
            .limit(1)
        )
        row = self._first(query)
        return msgspec.convert(with_json(row), CheckpointRow) if row else None

    # ---- tenants and keys --------------------------------------------------------------------------------------------

    def key(self, key_id: str) -> KeyRow | None:
        """An API key, revoked or not."""
        row = self._first(sa.select(*columns(t.api_keys, KeyRow)).where(t.api_keys.c.key_id == key_id))
        return row_of(KeyRow, row) if row else None

    def keys(self, tenant: str | None = None) -> list[KeyRow]:
        """API keys, oldest first, the revoked ones too."""
        query = sa.select(*columns(t.api_keys, KeyRow)).order_by(t.api_keys.c.created_us, t.api_keys.c.key_id)
        if tenant is not None:
            query = query.where(t.api_keys.c.tenant == tenant)
        return [row_of(KeyRow, row) for row in self._all(query)]

    def tenant(self, tenant: str) -> TenantRow:
        """Share and limits of the tenant; the defaults if they were never set."""
        row = self._first(_TENANT, tenant=tenant)
        return row_of(TenantRow, row) if row else TenantRow(tenant=tenant)

    def tenants(self) -> list[str]:
        """Every tenant the log has an event of, by name, without the system's own."""
        c = t.streams.c
        query = sa.select(c.tenant).where(c.tenant != SYSTEM_TENANT).distinct().order_by(c.tenant)
        return [row["tenant"] for row in self._all(query)]

    # ---- the served model ---------------------------------------------------------------------------------------

    def environment(self) -> kinds.EnvironmentRecorded | None:
        """The newest environment an executor came up in: it has what a caller must know of the served model."""
        with self._engine.connect() as connection:
            newest = connection.execute(_NEWEST_ENVIRONMENT).scalar()
            if newest is None:
                return None
            cached = self._environment
            if cached is None or cached[0] != newest:
                event = reading.at_positions(connection, [newest])[0].event
                assert isinstance(event, kinds.EnvironmentRecorded)
                cached = self._environment = (newest, event)
        return cached[1]
