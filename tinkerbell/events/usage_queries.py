"""Questions about what was used, and about the course of runs."""

from typing import Any

import sqlalchemy as sa

from tinkerbell.events import tables as t
from tinkerbell.events.querying import Querying, columns, row_of
from tinkerbell.events.rows import HourOfUsage, RunCounts, RunPoint, UsageRow
from tinkerbell.events.run_points import fold_run

RUN_TYPES = ("forward_backward.completed", "optim_step.completed", "load.completed")


class UsageQueries(Querying):
    """See Queries."""

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
        return [row_of(UsageRow, {**row, "adapter": row["adapter"] or None}) for row in self._all(query)]

    def usage_by_hour(self, tenant: str, begin_us: int, end_us: int) -> list[HourOfUsage]:
        """Of hours that begin in [begin_us, end_us), by hour, adapter and kind."""
        c = t.usage.c
        query = (
            sa.select(*columns(t.usage, HourOfUsage))
            .where(c.tenant == tenant, c.hour_us >= begin_us, c.hour_us < end_us)
            .order_by(c.hour_us, c.adapter, c.kind)
        )
        return [row_of(HourOfUsage, row) for row in self._all(query)]

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
