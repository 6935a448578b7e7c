"""Questions about sessions, samplers, and what they made."""

from collections.abc import Collection
from typing import Any

import msgspec
import sqlalchemy as sa

from tinkerbell.events import tables as t
from tinkerbell.events.querying import Querying, columns, row_of, with_json
from tinkerbell.events.rows import AdapterRow, SamplerRow, SamplerWeightsRow, SessionRow


class SessionQueries(Querying):
    """See Queries."""

    def session(self, tenant: str, id: str) -> SessionRow | None:
        """A session of the tenant, ended or not."""
        c = t.sessions.c
        row = self._first(sa.select(*columns(t.sessions, SessionRow)).where(c.id == id, c.tenant == tenant))
        return msgspec.convert(with_json(row), SessionRow) if row else None

    def sessions(
        self, tenant: str, *, after: tuple[int, str] | None = None, offset: int = 0, limit: int | None = None
    ) -> list[SessionRow]:
        """Sessions of the tenant, newest first; `after`: created_us and id of the one before the first."""
        c = t.sessions.c
        query = sa.select(*columns(t.sessions, SessionRow)).where(c.tenant == tenant)
        if after is not None:
            at_us, id = after
            # The first condition is what the index is entered with.
            query = query.where(c.created_us <= at_us, sa.or_(c.created_us < at_us, c.id > id))
        return self._sessions(query.order_by(c.created_us.desc(), c.id).offset(offset).limit(limit))

    def sessions_named(self, tenant: str, ids: Collection[str]) -> list[SessionRow]:
        """Those of the tenant's sessions that have these ids."""
        c = t.sessions.c
        query = sa.select(*columns(t.sessions, SessionRow)).where(c.id.in_(ids), c.tenant == tenant)
        # A planner that is shown an empty list may well read all sessions to find none.
        return self._sessions(query) if ids else []

    def silent_sessions(self, before_us: int) -> list[SessionRow]:
        """Of all tenants, those that have not ended and did not say since then that they run, oldest first."""
        c = t.sessions.c
        query = sa.select(*columns(t.sessions, SessionRow)).where(sa.text(t.OPEN), c.heard_us < before_us)
        return self._sessions(query.order_by(c.created_us, c.id))

    def living_adapters(self, tenant: str, session: str) -> list[AdapterRow]:
        """Adapters that a session of the tenant made and nobody removed, oldest first."""
        c = t.adapters.c
        query = sa.select(*columns(t.adapters, AdapterRow)).where(
            c.tenant == tenant, c.session == session, sa.text(t.LIVING)
        )
        rows = self._all(query.order_by(c.created_us, c.id))
        return [msgspec.convert(with_json(row), AdapterRow) for row in rows]

    def uncleared_sessions(self) -> list[SessionRow]:
        """Of all tenants, those that have ended and still have living adapters, oldest first."""
        s = t.sessions.c
        living = sa.select(t.adapters.c.session).where(sa.text(t.LIVING))
        query = sa.select(*columns(t.sessions, SessionRow)).where(s.id.in_(living), s.ended_us.is_not(None))
        return self._sessions(query.order_by(s.created_us, s.id))

    def is_session_used(self, tenant: str, session: str, since_us: int) -> bool:
        """Whether a request to anything that the session of the tenant made was made since then, or still waits; of a
        sample of the base model also whether it was answered since."""
        a, f, e = t.adapters.c, t.futures.c, t.events.c
        of_session = sa.select(a.id).where(a.tenant == tenant, a.session == session)
        waits = sa.select(f.id).where(f.tenant == tenant, sa.text(t.PENDING), f.adapter.in_(of_session))
        if self._first(waits.limit(1)) is not None:
            return True
        newest = sa.select(f.created_us).where(f.adapter == a.id).order_by(f.id.desc()).limit(1)
        used = of_session.where(newest.correlate(t.adapters).scalar_subquery() >= since_us)
        if self._first(used.limit(1)) is not None:
            return True
        if all(sampler.checkpoint is not None for sampler in self.samplers(tenant, session)):
            return False
        # Samples of the base model have no adapter, but a key. What was asked since then waits, or was answered since.
        samples = (
            sa.select(f.id)
            .join(t.events, e.position == f.id)
            .where(f.tenant == tenant, f.adapter.is_(None))
            .where(e.idempotency_key.startswith(f"tinker:{session}:sample:", autoescape=True))
            .limit(1)
        )
        recent = (sa.text(t.PENDING), f.done_us >= since_us)
        return any(self._first(samples.where(condition)) is not None for condition in recent)

    def _sessions(self, query: sa.Select[*tuple[Any, ...]]) -> list[SessionRow]:
        return [msgspec.convert(with_json(row), SessionRow) for row in self._all(query)]

    # ---- samplers ----------------------------------------------------------------------------------------------------

    def sampler(self, tenant: str, id: str) -> SamplerRow | None:
        """A sampler of the tenant."""
        c = t.samplers.c
        row = self._first(sa.select(*columns(t.samplers, SamplerRow)).where(c.id == id, c.tenant == tenant))
        return row_of(SamplerRow, row) if row else None

    def sampler_weights(self) -> list[SamplerWeightsRow]:
        """Of all tenants, the checkpoints that were saved without a name for one sampler, and are still there, oldest
        first; not those that another living adapter began with, nor those that their owner published."""
        c, made, holder, other = t.checkpoints.c, t.samplers.c, t.adapters.alias("holder"), t.adapters.alias("other")
        living = other.c.state.in_(("pending", "ready"))
        begun = sa.exists().where(other.c.checkpoint == c.id, other.c.id != made.id, living)
        query = (
            sa.select(
                *(c.id, c.tenant, c.adapter, c.position, c.blobs, c.created_us, c.expires_us),
                made.id.label("sampler"),
                holder.c.state.label("sampler_state"),
                t.sessions.c.ended_us,
            )
            .join(t.samplers, sa.and_(made.checkpoint == c.id, made.tenant == c.tenant))
            .join(t.sessions, t.sessions.c.id == made.session)
            .outerjoin(holder, holder.c.id == made.id)
            .where(sa.text("checkpoints.use = 'sampler' AND checkpoints.name IS NULL AND NOT checkpoints.deleted"))
            .where(~c.published, ~begun)
            .order_by(c.position)
        )
        return [msgspec.convert(with_json(row), SamplerWeightsRow) for row in self._all(query)]

    def is_used(self, adapter: str, since_us: int) -> bool:
        """Whether a request to the adapter was made since then, or still waits."""
        f = t.futures.c
        recent = sa.or_(f.created_us >= since_us, f.state == "pending")
        return self._first(sa.select(f.id).where(f.adapter == adapter, recent).limit(1)) is not None

    def samplers(self, tenant: str, session: str) -> list[SamplerRow]:
        """Samplers of a session of the tenant, oldest first."""
        c = t.samplers.c
        query = sa.select(*columns(t.samplers, SamplerRow)).where(c.tenant == tenant, c.session == session)
        return [row_of(SamplerRow, row) for row in self._all(query.order_by(c.created_us, c.id))]
