"""Read-only questions to the projections. Whatever belongs to a tenant is asked for with the tenant."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy import RowMapping

from tinkerbell.events import kinds, reading
from tinkerbell.events import tables as t
from tinkerbell.events.rows import (
    AdapterRow,
    AnsweredRow,
    CheckpointRow,
    FutureRow,
    HourOfUsage,
    KeyRow,
    Row,
    RunCounts,
    RunPoint,
    SamplerRow,
    SessionRow,
    TenantRow,
    UsageRow,
)
from tinkerbell.events.run_points import fold_run
from tinkerbell.types import SYSTEM_TENANT, CheckpointUse

__all__ = [
    "AdapterRow",
    "CheckpointRow",
    "FutureRow",
    "KeyRow",
    "Queries",
    "RunCounts",
    "RunPoint",
    "SamplerRow",
    "SessionRow",
    "TenantRow",
    "UsageRow",
]

R = TypeVar("R", bound=Row)
_EMPTY = {"lora": "", "blobs": "{}", "tags": "[]", "user_metadata": "{}"}
"""Columns of JSON."""
RUN_TYPES = ("forward_backward.completed", "optim_step.completed", "load.completed")


def _columns(table: sa.Table, row: type[Row]) -> list[sa.Column[Any]]:
    return [table.c[name] for name in row.__struct_fields__]


def _row(row: type[R], values: Mapping[Any, Any]) -> R:
    return row(**values)


def _with_json(values: RowMapping) -> dict[str, Any]:
    # NULL is an empty one.
    decoded = {name: msgspec.json.decode(values[name] or _EMPTY[name]) for name in _EMPTY if name in values}
    # Names of columns are a subclass of str, which msgspec does not take for one.
    return {str(name): decoded.get(name, value) for name, value in values.items()}


# What every request asks is built once: building a statement costs more than running it.
_FUTURE = sa.select(*_columns(t.futures, FutureRow)).where(
    t.futures.c.id == sa.bindparam("id"), t.futures.c.tenant == sa.bindparam("tenant")
)
_PENDING_COUNT = sa.select(
    sa.func.count().label("requests"),
    sa.cast(sa.func.coalesce(sa.func.sum(t.futures.c.num_tokens), 0), t.Big).label("tokens"),
).where(t.futures.c.tenant == sa.bindparam("tenant"), sa.text(t.PENDING))
_PLACE = sa.select(sa.func.count().label("before")).where(
    t.futures.c.tenant == sa.bindparam("tenant"), t.futures.c.id < sa.bindparam("id"), sa.text(t.PENDING)
)
_TENANT = sa.select(*_columns(t.tenants, TenantRow)).where(t.tenants.c.tenant == sa.bindparam("tenant"))
_NEWEST_ENVIRONMENT = sa.select(sa.func.max(t.environments.c.position))


class Queries:
    """Answers as of the last commit."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._environment: tuple[int, kinds.EnvironmentRecorded] | None = None

    def _all(self, query: sa.Select[*tuple[Any, ...]], **values: Any) -> list[RowMapping]:
        with self._engine.connect() as connection:
            return list(connection.execute(query, values).mappings())

    def _first(self, query: sa.Select[*tuple[Any, ...]], **values: Any) -> RowMapping | None:
        rows = self._all(query, **values)
        return rows[0] if rows else None

    # ---- requests --------------------------------------------------------------------------------------------------

    def future(self, tenant: str, id: int) -> FutureRow | None:
        """A request of the tenant."""
        row = self._first(_FUTURE, id=id, tenant=tenant)
        return _row(FutureRow, row) if row else None

    def pending(self, tenant: str | None = None) -> list[FutureRow]:
        """Requests without an answer, by position."""
        query = sa.select(*_columns(t.futures, FutureRow)).where(sa.text(t.PENDING)).order_by(t.futures.c.id)
        if tenant is not None:
            query = query.where(t.futures.c.tenant == tenant)
        return [_row(FutureRow, row) for row in self._all(query)]

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
        return [_row(AnsweredRow, row) for row in self._all(query)]

    # ---- adapters and checkpoints ------------------------------------------------------------------------------------

    def adapter(self, tenant: str, id: str) -> AdapterRow | None:
        """An adapter of the tenant, whatever its state."""
        c = t.adapters.c
        row = self._first(sa.select(*_columns(t.adapters, AdapterRow)).where(c.id == id, c.tenant == tenant))
        return msgspec.convert(_with_json(row), AdapterRow) if row else None

    def adapters(self, tenant: str | None = None) -> list[AdapterRow]:
        """Adapters of the tenant (of all of them: None), oldest first."""
        query = sa.select(*_columns(t.adapters, AdapterRow)).order_by(t.adapters.c.created_us, t.adapters.c.id)
        if tenant is not None:
            query = query.where(t.adapters.c.tenant == tenant)
        return [msgspec.convert(_with_json(row), AdapterRow) for row in self._all(query)]

    def checkpoint(self, tenant: str, id: str) -> CheckpointRow | None:
        """A checkpoint of the tenant."""
        c = t.checkpoints.c
        row = self._first(sa.select(*_columns(t.checkpoints, CheckpointRow)).where(c.id == id, c.tenant == tenant))
        return msgspec.convert(_with_json(row), CheckpointRow) if row else None

    def checkpoints(self, tenant: str, adapter: str | None = None, kind: str | None = "save") -> list[CheckpointRow]:
        """Checkpoints of the tenant, oldest first; `kind` None: the server's recovery points too."""
        c = t.checkpoints.c
        query = sa.select(*_columns(t.checkpoints, CheckpointRow)).where(c.tenant == tenant).order_by(c.position)
        if adapter is not None:
            query = query.where(c.adapter == adapter)
        if kind is not None:
            query = query.where(c.kind == kind)
        return [msgspec.convert(_with_json(row), CheckpointRow) for row in self._all(query)]

    def saved(self, tenant: str, adapter: str, use: CheckpointUse, name: str) -> CheckpointRow | None:
        """The newest checkpoint of the adapter that was saved for this use under this name."""
        c = t.checkpoints.c
        query = (
            sa.select(*_columns(t.checkpoints, CheckpointRow))
            .where(c.tenant == tenant, c.adapter == adapter, c.kind == "save", c.use == use, c.name == name)
            .order_by(c.position.desc())
            .limit(1)
        )
        row = self._first(query)
        return msgspec.convert(_with_json(row), CheckpointRow) if row else None

    # ---- sessions and samplers ---------------------------------------------------------------------------------------

    def session(self, tenant: str, id: str) -> SessionRow | None:
        """A session of the tenant, ended or not."""
        c = t.sessions.c
        row = self._first(sa.select(*_columns(t.sessions, SessionRow)).where(c.id == id, c.tenant == tenant))
        return msgspec.convert(_with_json(row), SessionRow) if row else None

    def sessions(self, tenant: str) -> list[SessionRow]:
        """Sessions of the tenant, newest first."""
        c = t.sessions.c
        query = sa.select(*_columns(t.sessions, SessionRow)).where(c.tenant == tenant)
        rows = self._all(query.order_by(c.created_us.desc(), c.id))
        return [msgspec.convert(_with_json(row), SessionRow) for row in rows]

    def silent_sessions(self, before_us: int) -> list[SessionRow]:
        """Of all tenants, those that have not ended and did not say since then that they run, oldest first."""
        c = t.sessions.c
        query = sa.select(*_columns(t.sessions, SessionRow)).where(c.ended_us.is_(None), c.heard_us < before_us)
        rows = self._all(query.order_by(c.created_us, c.id))
        return [msgspec.convert(_with_json(row), SessionRow) for row in rows]

    def living_adapters(self, tenant: str, session: str) -> list[AdapterRow]:
        """Adapters that a session of the tenant made and nobody removed, oldest first."""
        c = t.adapters.c
        query = sa.select(*_columns(t.adapters, AdapterRow)).where(
            c.tenant == tenant, c.id.startswith(f"{session}:", autoescape=True), c.state.in_(("pending", "ready"))
        )
        rows = self._all(query.order_by(c.created_us, c.id))
        return [msgspec.convert(_with_json(row), AdapterRow) for row in rows]

    def uncleared_sessions(self) -> list[SessionRow]:
        """Of all tenants, those that have ended and still have living adapters, oldest first."""
        a, s = t.adapters.c, t.sessions.c
        living = sa.select(a.id).where(a.id.startswith("se_", autoescape=True), a.state.in_(("pending", "ready")))
        ids = {row["id"].partition(":")[0] for row in self._all(living)}
        query = sa.select(*_columns(t.sessions, SessionRow)).where(s.id.in_(ids), s.ended_us.is_not(None))
        rows = self._all(query.order_by(s.created_us, s.id))
        return [msgspec.convert(_with_json(row), SessionRow) for row in rows]

    def is_session_used(self, tenant: str, session: str, since_us: int) -> bool:
        """Whether a request to anything that the session of the tenant made was made since then, or still waits."""
        f, e = t.futures.c, t.events.c
        recent = sa.or_(f.created_us >= since_us, sa.text(t.PENDING))
        for row in self.living_adapters(tenant, session):
            if self._first(sa.select(f.id).where(f.adapter == row.id, recent).limit(1)) is not None:
                return True
        if all(sampler.checkpoint is not None for sampler in self.samplers(tenant, session)):
            return False
        # Samples of the base model have no adapter, but a key.
        query = (
            sa.select(f.id)
            .join(t.events, e.position == f.id)
            .where(f.tenant == tenant, f.adapter.is_(None), recent)
            .where(e.idempotency_key.startswith(f"tinker:{session}:sample:", autoescape=True))
        )
        return self._first(query.limit(1)) is not None

    def sampler(self, tenant: str, id: str) -> SamplerRow | None:
        """A sampler of the tenant."""
        c = t.samplers.c
        row = self._first(sa.select(*_columns(t.samplers, SamplerRow)).where(c.id == id, c.tenant == tenant))
        return _row(SamplerRow, row) if row else None

    def samplers(self, tenant: str, session: str) -> list[SamplerRow]:
        """Samplers of a session of the tenant, oldest first."""
        c = t.samplers.c
        query = sa.select(*_columns(t.samplers, SamplerRow)).where(c.tenant == tenant, c.session == session)
        return [_row(SamplerRow, row) for row in self._all(query.order_by(c.created_us, c.id))]

    # ---- tenants and keys --------------------------------------------------------------------------------------------

    def key(self, key_id: str) -> KeyRow | None:
        """An API key, revoked or not."""
        row = self._first(sa.select(*_columns(t.api_keys, KeyRow)).where(t.api_keys.c.key_id == key_id))
        return _row(KeyRow, row) if row else None

    def keys(self, tenant: str | None = None) -> list[KeyRow]:
        """API keys, oldest first, the revoked ones too."""
        query = sa.select(*_columns(t.api_keys, KeyRow)).order_by(t.api_keys.c.created_us, t.api_keys.c.key_id)
        if tenant is not None:
            query = query.where(t.api_keys.c.tenant == tenant)
        return [_row(KeyRow, row) for row in self._all(query)]

    def tenant(self, tenant: str) -> TenantRow:
        """Share and limits of the tenant; the defaults if they were never set."""
        row = self._first(_TENANT, tenant=tenant)
        return _row(TenantRow, row) if row else TenantRow(tenant=tenant)

    def tenants(self) -> list[str]:
        """Every tenant the log has an event of, by name, without the system's own."""
        c = t.streams.c
        query = sa.select(c.tenant).where(c.tenant != SYSTEM_TENANT).distinct().order_by(c.tenant)
        return [row["tenant"] for row in self._all(query)]

    # ---- usage -------------------------------------------------------------------------------------------------------

    def usage(self, tenant: str | None = None) -> list[UsageRow]:
        """All that was ever used, by tenant, adapter and kind."""
        c = t.usage.c
        sums = [
            sa.cast(sa.func.sum(c[name]), t.Big).label(name)
            for name in ("num_requests", "tokens_in", "tokens_out", "cost_us")
        ]
        keys = (c.tenant, c.adapter, c.kind)
        query = sa.select(*keys, *sums).group_by(*keys).order_by(*keys)
        if tenant is not None:
            query = query.where(c.tenant == tenant)
        return [_row(UsageRow, {**row, "adapter": row["adapter"] or None}) for row in self._all(query)]

    def usage_by_hour(self, tenant: str, begin_us: int, end_us: int) -> list[HourOfUsage]:
        """Of hours that begin in [begin_us, end_us), by hour, adapter and kind."""
        c = t.usage.c
        query = (
            sa.select(*_columns(t.usage, HourOfUsage))
            .where(c.tenant == tenant, c.hour_us >= begin_us, c.hour_us < end_us)
            .order_by(c.hour_us, c.adapter, c.kind)
        )
        return [_row(HourOfUsage, row) for row in self._all(query)]

    def recent_usage(self, since_us: int, tenant: str | None = None) -> dict[str, tuple[int, int]]:
        """Tenant -> (cost_us, tokens in and out) of what was answered after `since_us`."""
        c = t.futures.c
        cost = sa.cast(sa.func.sum(c.cost_us), t.Big).label("cost_us")
        tokens = sa.cast(sa.func.sum(c.num_tokens + c.tokens_out), t.Big).label("tokens")
        query = sa.select(c.tenant, cost, tokens).where(c.done_us > since_us).group_by(c.tenant).order_by(c.tenant)
        if tenant is not None:
            query = query.where(c.tenant == tenant)
        return {row["tenant"]: (row["cost_us"], row["tokens"]) for row in self._all(query)}

    # ---- runs --------------------------------------------------------------------------------------------------------

    def run_points(self, tenant: str, adapter: str, after_step: int = 0, limit: int = 10_000) -> list[RunPoint]:
        """The adapter's optimizer steps with a number above `after_step`, oldest first.

        A load can take the step count back; then the points after the run was last at `after_step` or below.
        """
        e, q = t.events.alias(), t.events.alias()
        mine = sa.and_(e.c.tenant == tenant, e.c.adapter == adapter)
        start = 0
        if after_step > 0:
            steps = sa.text(
                "SELECT coalesce(max(position), 0) FROM audit_optim_steps WHERE adapter = :a AND step <= :s"
            )
            with self._engine.connect() as connection:
                start = int(connection.execute(steps, {"a": adapter, "s": after_step}).scalar_one())
        query = (
            sa.select(e.c.type, e.c.schema_version, e.c.data, e.c.created_us, q.c.type, q.c.schema_version, q.c.data)
            .join(q, q.c.position == e.c.causation)
            .where(mine, e.c.type.in_(RUN_TYPES), e.c.position > start)
            .order_by(e.c.position)
        )
        with self._engine.connect() as connection:
            points = fold_run(tuple(row) for row in connection.execute(query))
            return [point for _, point in zip(range(limit), (p for p in points if p.step > after_step), strict=False)]

    def run_counts(self, tenant: str, adapter: str) -> RunCounts:
        """Totals over the adapter's requests: all, failed, tokens brought by all, cost of the answered."""
        c = t.futures.c

        def total(value: Any) -> sa.Cast[int]:
            return sa.cast(sa.func.coalesce(sa.func.sum(value), 0), t.Big)

        query = sa.select(
            sa.func.count().label("requests"),
            total(sa.case((c.state == "failed", 1), else_=0)).label("failed"),
            total(c.num_tokens).label("tokens"),
            total(c.cost_us).label("cost"),
        ).where(c.tenant == tenant, c.adapter == adapter)
        row = self._first(query)
        assert row is not None
        return RunCounts(row["requests"], row["failed"], row["tokens"], row["cost"])

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
