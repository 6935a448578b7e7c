"""Questions about sessions, samplers, and what they made."""

import msgspec
import sqlalchemy as sa

from tinkerbell.events import tables as t
from tinkerbell.events.querying import Querying, columns, row_of, with_json
from tinkerbell.events.rows import AdapterRow, SamplerRow, SessionRow


class SessionQueries(Querying):
    """See Queries."""

    def session(self, tenant: str, id: str) -> SessionRow | None:
        """A session of the tenant, ended or not."""
        c = t.sessions.c
        row = self._first(sa.select(*columns(t.sessions, SessionRow)).where(c.id == id, c.tenant == tenant))
        return msgspec.convert(with_json(row), SessionRow) if row else None

    def sessions(self, tenant: str) -> list[SessionRow]:
        """Sessions of the tenant, newest first."""
        c = t.sessions.c
        query = sa.select(*columns(t.sessions, SessionRow)).where(c.tenant == tenant)
        rows = self._all(query.order_by(c.created_us.desc(), c.id))
        return [msgspec.convert(with_json(row), SessionRow) for row in rows]

    def silent_sessions(self, before_us: int) -> list[SessionRow]:
        """Of all tenants, those that have not ended and did not say since then that they run, oldest first."""
        c = t.sessions.c
        query = sa.select(*columns(t.sessions, SessionRow)).where(c.ended_us.is_(None), c.heard_us < before_us)
        rows = self._all(query.order_by(c.created_us, c.id))
        return [msgspec.convert(with_json(row), SessionRow) for row in rows]

    def living_adapters(self, tenant: str, session: str) -> list[AdapterRow]:
        """Adapters that a session of the tenant made and nobody removed, oldest first."""
        c = t.adapters.c
        query = sa.select(*columns(t.adapters, AdapterRow)).where(
            c.tenant == tenant, c.id.startswith(f"{session}:", autoescape=True), c.state.in_(("pending", "ready"))
        )
        rows = self._all(query.order_by(c.created_us, c.id))
        return [msgspec.convert(with_json(row), AdapterRow) for row in rows]

    def uncleared_sessions(self) -> list[SessionRow]:
        """Of all tenants, those that have ended and still have living adapters, oldest first."""
        a, s = t.adapters.c, t.sessions.c
        living = sa.select(a.id).where(a.id.startswith("se_", autoescape=True), a.state.in_(("pending", "ready")))
        ids = {row["id"].partition(":")[0] for row in self._all(living)}
        query = sa.select(*columns(t.sessions, SessionRow)).where(s.id.in_(ids), s.ended_us.is_not(None))
        rows = self._all(query.order_by(s.created_us, s.id))
        return [msgspec.convert(with_json(row), SessionRow) for row in rows]

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
        row = self._first(sa.select(*columns(t.samplers, SamplerRow)).where(c.id == id, c.tenant == tenant))
        return row_of(SamplerRow, row) if row else None

    def samplers(self, tenant: str, session: str) -> list[SamplerRow]:
        """Samplers of a session of the tenant, oldest first."""
        c = t.samplers.c
        query = sa.select(*columns(t.samplers, SamplerRow)).where(c.tenant == tenant, c.session == session)
        return [row_of(SamplerRow, row) for row in self._all(query.order_by(c.created_us, c.id))]
