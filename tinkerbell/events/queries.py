"""Read-only questions to the projections. Whatever belongs to a tenant is asked for with the tenant."""

from collections.abc import Collection

import sqlalchemy as sa

from tinkerbell.config import Limits
from tinkerbell.events import holdings, kinds, reading
from tinkerbell.events import tables as t
from tinkerbell.events.adapter_queries import AdapterQueries
from tinkerbell.events.base_model_queries import BaseModelQueries
from tinkerbell.events.querying import columns, row_of
from tinkerbell.events.quotas import Holding
from tinkerbell.events.rows import (
    AnsweredRow,
    FutureRow,
    KeyRow,
    TenantRow,
)
from tinkerbell.events.session_queries import SessionQueries
from tinkerbell.events.usage_queries import UsageQueries
from tinkerbell.types import SYSTEM_TENANT

# What every request asks is built once: building a statement costs more than running it.
_FUTURE = sa.select(*columns(t.futures, FutureRow)).where(
    t.futures.c.id == sa.bindparam("id"), t.futures.c.tenant == sa.bindparam("tenant")
)
_LINE = sa.select(t.lines.c.num_requests, t.lines.c.num_tokens).where(t.lines.c.tenant == sa.bindparam("tenant"))
_PLACE = sa.select(sa.func.count().label("before")).where(
    t.futures.c.tenant == sa.bindparam("tenant"), t.futures.c.id < sa.bindparam("id"), sa.text(t.PENDING)
)
_TENANT = sa.select(*columns(t.tenants, TenantRow)).where(t.tenants.c.tenant == sa.bindparam("tenant"))
_NEWEST_ENVIRONMENT = sa.select(sa.func.max(t.environments.c.position))


class Queries(AdapterQueries, BaseModelQueries, SessionQueries, UsageQueries):
    """Answers as of the last commit."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self._environment: tuple[int, kinds.EnvironmentRecorded] | None = None

    # ---- requests --------------------------------------------------------------------------------------------------

    def future(self, tenant: str, id: int) -> FutureRow | None:
        """A request of the tenant."""
        row = self._first(_FUTURE, id=id, tenant=tenant)
        return row_of(FutureRow, row) if row else None

    def pending(self, tenant: str | None = None, *, after: int = 0, limit: int | None = None) -> list[FutureRow]:
        """Requests without an answer with a position above `after`, by position."""
        c = t.futures.c
        query = sa.select(*columns(t.futures, FutureRow)).where(sa.text(t.PENDING), c.id > after).order_by(c.id)
        if tenant is not None:
            query = query.where(c.tenant == tenant)
        return [row_of(FutureRow, row) for row in self._all(query.limit(limit))]

    def pending_count(self, tenant: str) -> tuple[int, int]:
        """(requests, tokens) of the tenant that wait for their answer; tokens that may be sampled count."""
        row = self._first(_LINE, tenant=tenant)
        return (0, 0) if row is None else (row["num_requests"], row["num_tokens"])

    def place(self, tenant: str, id: int) -> int:
        """How many pending requests of the tenant were accepted before this one."""
        row = self._first(_PLACE, tenant=tenant, id=id)
        assert row is not None
        return int(row["before"])

    def attempts(self, tenant: str, adapter: str, kind: str) -> tuple[int, bool]:
        """How many requests of this kind the adapter was asked, and whether one of them waits."""
        c, f = t.totals.c, t.futures.c
        asked = sa.select(c.num_accepted).where(c.tenant == tenant, c.adapter == adapter, c.kind == kind)
        waiting = sa.select(f.id).where(f.tenant == tenant, f.adapter == adapter, f.kind == kind, sa.text(t.PENDING))
        row = self._first(asked)
        return (row["num_accepted"] if row else 0), self._first(waiting.limit(1)) is not None

    def last_requests_us(self, adapters: Collection[str]) -> dict[str, int]:
        """Adapter -> when its newest request was accepted."""
        a, f = t.adapters.c, t.futures.c
        newest = sa.select(sa.func.max(f.id)).where(f.adapter == a.id).correlate(t.adapters).scalar_subquery()
        ids = sa.select(newest).where(a.id.in_(adapters))
        rows = self._all(sa.select(f.adapter, f.created_us).where(f.id.in_(ids)))
        return {row["adapter"]: row["created_us"] for row in rows}

    def newest_request(self, tenant: str, adapter: str, kind: str) -> FutureRow | None:
        """The last request of this kind to an adapter of the tenant."""
        c = t.futures.c
        query = sa.select(*columns(t.futures, FutureRow)).where(
            c.tenant == tenant, c.adapter == adapter, c.kind == kind
        )
        row = self._first(query.order_by(c.id.desc()).limit(1))
        return row_of(FutureRow, row) if row else None

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

    def has_keys(self) -> bool:
        """Whether any API key was ever made."""
        return self._first(sa.select(t.api_keys.c.key_id).limit(1)) is not None

    def num_valid_keys(self) -> int:
        """API keys that open something."""
        row = self._first(sa.select(sa.func.count().label("keys")).where(t.api_keys.c.revoked_us.is_(None)))
        assert row is not None
        return int(row["keys"])

    def tenant(self, tenant: str) -> TenantRow:
        """Share and limits of the tenant; the defaults if they were never set."""
        row = self._first(_TENANT, tenant=tenant)
        return row_of(TenantRow, row) if row else TenantRow(tenant=tenant)

    def weights(self) -> dict[str, float]:
        """Of tenants whose share was set."""
        c = t.tenants.c
        return {row["tenant"]: row["weight"] for row in self._all(sa.select(c.tenant, c.weight))}

    def holding(self, tenant: str, defaults: Limits) -> Holding:
        """What the tenant has of everything that is limited, and what it may have; `defaults`: the server's limits."""
        with self._engine.connect() as connection:
            return holdings.of_tenant(connection, tenant, defaults)

    def was_erased(self, tenant: str) -> bool:
        """Whether the tenant was erased at some time."""
        return self._first(sa.select(t.erasures.c.position).where(t.erasures.c.tenant == tenant)) is not None

    def tenants(self) -> list[str]:
        """Every tenant the log has an event of, by name, without the system's own."""
        # From one tenant to the next in the index: DISTINCT would read every event.
        e = t.events.alias()
        first = sa.select(sa.func.min(t.events.c.tenant).label("tenant")).cte("found", recursive=True)
        following = sa.select(sa.func.min(e.c.tenant)).where(e.c.tenant > first.c.tenant).scalar_subquery()
        found = first.union_all(sa.select(following).where(first.c.tenant.is_not(None)))
        query = sa.select(found.c.tenant).where(found.c.tenant.is_not(None), found.c.tenant != SYSTEM_TENANT)
        return sorted(row["tenant"] for row in self._all(query))

    def environment_of(self, batch: str) -> kinds.EnvironmentRecorded | None:
        """In which a batch was planned to run; None where the log does not say, or not readably."""
        b, e = t.batches.c, t.environments.c
        digest = sa.select(b.environment).where(b.id == batch).scalar_subquery()
        row = self._first(sa.select(sa.func.min(e.position).label("position")).where(e.digest == digest))
        if row is None or row["position"] is None:
            return None
        with self._engine.connect() as connection:
            event = reading.at_positions(connection, [row["position"]])[0].event
        return event if isinstance(event, kinds.EnvironmentRecorded) else None

    # ---- the served model ---------------------------------------------------------------------------------------

    def environment(self) -> kinds.EnvironmentRecorded | None:
        """The newest environment an executor came up in: it has what a caller must know of the served model."""
        with self._engine.connect() as connection:
            newest = connection.execute(_NEWEST_ENVIRONMENT).scalar()
            cached = self._environment
            if newest is not None and (cached is None or cached[0] != newest):
                readable = _newest_readable(connection)
                cached = self._environment = None if readable is None else (newest, readable)
        return None if newest is None or cached is None else cached[1]


def _newest_readable(connection: sa.Connection) -> kinds.EnvironmentRecorded | None:
    positions = connection.execute(sa.select(t.environments.c.position).order_by(t.environments.c.position.desc()))
    for position in positions.scalars():
        for recorded in reading.at_positions(connection, [position]):
            if isinstance(recorded.event, kinds.EnvironmentRecorded):
                return recorded.event
    return None
