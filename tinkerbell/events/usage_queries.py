"""Questions about what was used, and about the course of runs."""

from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any

import sqlalchemy as sa

from tinkerbell.events import tables as t
from tinkerbell.events.querying import Querying, columns, row_of, unindexed
from tinkerbell.events.rows import HourOfUsage, RunCounts, RunPoint, UsageRow
from tinkerbell.events.run_points import fold_run

PAGE = 1000
ROWS_PER_POINT = 4
"""More or less: a step and the requests whose gradients it applies."""
RUN_TYPES = ("forward_backward.completed", "optim_step.completed", "load.completed")


class UsageQueries(Querying):
    """See Queries."""

    def usage(
        self, tenant: str | None = None, *, after: tuple[str, str, str] | None = None, limit: int | None = None
    ) -> list[UsageRow]:
        """All that was ever used, by tenant, adapter and kind; `after`: these of the row before the first, the adapter
        empty for the base model."""
        c = t.totals.c
        keys = (c.tenant, c.adapter, c.kind)
        query = sa.select(*keys, c.num_answered.label("num_requests"), c.tokens_in, c.tokens_out, c.cost_us)
        query = query.where(c.num_answered > 0).order_by(*keys)
        if tenant is not None:
            query = query.where(c.tenant == tenant)
        if after is not None:
            query = query.where(sa.tuple_(*keys) > sa.tuple_(*map(sa.literal, after)))
        rows = self._all(query.limit(limit))
        return [row_of(UsageRow, {**row, "adapter": row["adapter"] or None}) for row in rows]

    def served_us(self, tenant: str | None = None) -> dict[str, int]:
        """Tenant -> microseconds of the accelerator that were ever charged."""
        query = sa.select(t.bills.c.tenant, t.bills.c.cost_us)
        if tenant is not None:
            query = query.where(t.bills.c.tenant == tenant)
        return {row["tenant"]: row["cost_us"] for row in self._all(query)}

    def usage_by_hour(self, tenant: str, begin_us: int, end_us: int, limit: int | None = None) -> list[HourOfUsage]:
        """Of hours that begin in [begin_us, end_us), by hour, adapter and kind."""
        c = t.usage.c
        query = (
            sa.select(*columns(t.usage, HourOfUsage))
            .where(c.tenant == tenant, c.hour_us >= begin_us, c.hour_us < end_us)
            .order_by(c.hour_us, c.adapter, c.kind)
            .limit(limit)
        )
        return [row_of(HourOfUsage, row) for row in self._all(query)]

    def recent_usage(self, since_us: int, tenants: Collection[str]) -> dict[str, tuple[int, int]]:
        """Those of the tenants that were answered something after `since_us` -> its (cost_us, tokens in and out)."""
        c = t.futures.c
        cost = sa.cast(sa.func.sum(c.cost_us), t.Big).label("cost_us")
        tokens = sa.cast(sa.func.sum(c.num_tokens + c.tokens_out), t.Big).label("tokens")
        query = sa.select(c.tenant, cost, tokens).where(c.tenant.in_(tenants), c.done_us > since_us).group_by(c.tenant)
        return {row["tenant"]: (row["cost_us"], row["tokens"]) for row in self._all(query)}

    # ---- runs --------------------------------------------------------------------------------------------------------

    def run_points(self, tenant: str, adapter: str, after_step: int = 0, limit: int = 10_000) -> list[RunPoint]:
        """The adapter's optimizer steps with a number above `after_step`, oldest first.

        A load can take the step count back; then the points after the run was last at `after_step` or below.
        """
        start = self._last_at_step(adapter, after_step) if after_step > 0 else 0
        points = (
            point
            for point in fold_run(self._run_rows(tenant, adapter, start, min(ROWS_PER_POINT * limit, PAGE)))
            if point.step > after_step
        )
        return list(islice(points, limit))

    def _last_at_step(self, adapter: str, step: int) -> int:
        # From the newest step backwards: whoever follows a run has almost all of it.
        last = sa.text(
            "SELECT position FROM audit_optim_steps WHERE adapter = :a AND step <= :s ORDER BY position DESC LIMIT 1"
        )
        with self._engine.connect() as connection:
            return connection.execute(last, {"a": adapter, "s": step}).scalar() or 0

    def _run_rows(self, tenant: str, adapter: str, start: int, page: int) -> Iterator[tuple[Any, ...]]:
        """What `fold_run` takes, of events after `start`; read `page` at a time, as far as they are wanted."""
        e, q = t.events.alias(), t.events.alias()
        mine = sa.and_(unindexed(e.c.tenant) == tenant, e.c.adapter == adapter, e.c.type.in_(RUN_TYPES))
        asked = (q.c.type, q.c.schema_version, q.c.data)
        query = (
            sa.select(e.c.position, e.c.type, e.c.schema_version, e.c.data, e.c.created_us, *asked)
            .join(q, q.c.position == e.c.causation)
            .where(mine, e.c.position > sa.bindparam("start"))
            .order_by(e.c.position)
            .limit(page)
        )
        while True:
            with self._engine.connect() as connection:
                rows = connection.execute(query, {"start": start}).all()
            for position, *row in rows:
                yield tuple(row)
                start = position
            if len(rows) < page:
                return

    def run_counts(self, tenant: str, adapters: Collection[str]) -> dict[str, RunCounts]:
        """Adapter -> totals over its requests: all, failed, tokens brought by all, cost of the answered."""
        c = t.totals.c
        sums = [
            sa.cast(sa.func.sum(column), t.Big)
            for column in (c.num_accepted, c.num_failed, c.tokens_accepted, c.cost_us)
        ]
        query = sa.select(c.adapter, *sums).where(c.tenant == tenant, c.adapter.in_(adapters)).group_by(c.adapter)
        with self._engine.connect() as connection:
            found = {row[0]: RunCounts(*row[1:]) for row in connection.execute(query)}
        return {adapter: found.get(adapter, RunCounts(0, 0, 0, 0)) for adapter in adapters}
