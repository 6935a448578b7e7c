"""What tenants have of what is limited: counters that are kept with every event, and counts of living things.

Counted is what the limits themselves bound, by indexes that hold living things only: what was there once costs nothing.
"""

import time
from collections.abc import Collection, Iterable

import sqlalchemy as sa

from tinkerbell.config import Limits
from tinkerbell.events import kinds
from tinkerbell.events import tables as t
from tinkerbell.events.codec import EVENT_BYTES
from tinkerbell.events.kinds import AnyEvent, Recorded
from tinkerbell.events.quotas import BYTES_PER_PARAMETER, NAMES, Amounts, Holding, is_limited, limits_of, saved_bytes
from tinkerbell.events.removal import STILL_THERE, bulk_of
from tinkerbell.events.statements import Lookup, Statements
from tinkerbell.types import SYSTEM_TENANT, TenantId

COUNTED: tuple[type[AnyEvent], ...] = (
    kinds.AddLoraRequested,
    kinds.SessionStarted,
    kinds.SamplerCreated,
    kinds.SaveRequested,
    kinds.CheckpointCopied,
)
"""Kinds of events that make living things."""

_LINES = Lookup([t.lines.c.tenant], [t.lines.c.tenant, t.lines.c.num_requests, t.lines.c.num_tokens])
_STORED = Lookup([t.stored.c.tenant], [t.stored.c.tenant, t.stored.c.num_bytes])
_LIMITS = Lookup([t.tenants.c.tenant], [t.tenants.c.tenant, *(t.tenants.c[f"max_{name}"] for name in NAMES)])

_TENANT: sa.BindParameter[str] = sa.bindparam("tenant")


def _sum(value: sa.ColumnElement[int]) -> sa.Cast[int]:
    return sa.cast(sa.func.coalesce(sa.func.sum(value), 0), t.Big)


_OF_A_SAMPLER = t.adapters.c.id.like("%:sample:%")
_ADAPTERS = sa.select(
    _sum(sa.case((_OF_A_SAMPLER, 0), else_=1)), _sum(sa.func.coalesce(t.adapters.c.num_parameters, 0))
).where(t.adapters.c.tenant == _TENANT, sa.text(t.LIVING))
_SESSIONS = sa.select(sa.func.count()).where(t.sessions.c.tenant == _TENANT, sa.text(t.OPEN))
_SAMPLERS = (
    sa.select(sa.func.count())
    .select_from(
        t.samplers.join(t.sessions, t.sessions.c.id == t.samplers.c.session).outerjoin(
            t.checkpoints, t.checkpoints.c.id == t.samplers.c.checkpoint
        )
    )
    .where(t.sessions.c.tenant == _TENANT, sa.text(f"sessions.{t.OPEN}"), t.checkpoints.c.deleted.is_not(True))
)
_expires = t.checkpoints.c.expires_us
_CHECKPOINTS = sa.select(sa.func.count()).where(
    t.checkpoints.c.tenant == _TENANT, sa.text(t.KEPT), sa.or_(_expires.is_(None), _expires > sa.bindparam("now_us"))
)
_SAVES = (
    sa.select(sa.func.count(), _sum(sa.func.coalesce(t.adapters.c.num_parameters, 0)))
    .select_from(t.futures.join(t.adapters, t.adapters.c.id == t.futures.c.adapter))
    .where(t.futures.c.tenant == _TENANT, sa.text(f"futures.{t.PENDING}"), t.futures.c.kind == "save")
)


def read(
    connection: sa.Connection, statements: Statements, events: Iterable[tuple[TenantId, AnyEvent]], defaults: Limits
) -> dict[TenantId, Holding]:
    """Of the tenants for whose events limits hold: as much as these events can touch."""
    limited: dict[TenantId, set[type[AnyEvent]]] = {}
    for tenant, event in events:
        if is_limited(event):
            limited.setdefault(tenant, set()).add(type(event))
    if not limited:
        return {}
    lines = {tenant: (requests, tokens) for tenant, requests, tokens in statements.look_up(_LINES, limited)}
    stored = dict(statements.look_up(_STORED, limited))
    own = {tenant: dict(zip(NAMES, limits, strict=True)) for tenant, *limits in statements.look_up(_LIMITS, limited)}
    found: dict[TenantId, Holding] = {}
    for tenant, touched in limited.items():
        requests, tokens = lines.get(tenant, (0, 0))
        used = Amounts(pending_requests=requests, pending_tokens=tokens, stored_bytes=stored.get(tenant, 0))
        used += living(connection, tenant, touched)
        found[tenant] = Holding(used, limits_of(defaults, own.get(tenant, {})))
    return found


def of_tenant(connection: sa.Connection, tenant: TenantId, defaults: Limits) -> Holding:
    """All that a tenant has and may have."""
    statements = Statements(connection)
    requests, tokens = next(iter(statements.look_up(_LINES, [tenant])), (tenant, 0, 0))[1:]
    stored = dict(statements.look_up(_STORED, [tenant])).get(tenant, 0)
    own: dict[str, int | None] = {}
    for _, *limits in statements.look_up(_LIMITS, [tenant]):
        own = dict(zip(NAMES, limits, strict=True))
    used = Amounts(pending_requests=requests, pending_tokens=tokens, stored_bytes=stored)
    return Holding(used + living(connection, tenant, COUNTED), limits_of(defaults, own))


def leaving(connection: sa.Connection, recorded: Iterable[Recorded]) -> dict[TenantId, int]:
    """Tenant -> stored bytes that leave with these events, which are not written yet."""
    found: dict[TenantId, int] = {}
    compacted: set[int] = set()
    for each in recorded:
        match each.event:
            case kinds.TenantErased():
                condition = t.events.c.tenant == each.tenant
            case kinds.BulkCompacted() as event:
                condition = t.events.c.position.in_(set(event.positions) - compacted)
                compacted.update(event.positions)
            case _:
                continue
        found[each.tenant] = found.get(each.tenant, 0) + bulk_of(connection, condition).num_bytes
    return found


def stored_now(connection: sa.Connection) -> dict[TenantId, int]:
    """What the table `stored` must say, counted anew: it takes as long as the log is."""
    body, data = t.events.c.body, sa.cast(t.events.c.data, sa.Text)
    in_row = sa.case((sa.and_(body.is_not(None), STILL_THERE), sa.func.length(body)), else_=0)
    own = _sum(EVENT_BYTES + sa.func.length(data) + in_row)
    others = t.events.c.tenant != SYSTEM_TENANT
    rows = connection.execute(sa.select(t.events.c.tenant, own).where(others).group_by(t.events.c.tenant))
    found: dict[TenantId, int] = {row[0]: row[1] for row in rows}
    named = t.events.join(t.event_blobs, t.event_blobs.c.position == t.events.c.position)
    of_blobs = (
        sa.select(t.events.c.tenant, _sum(t.blobs.c.length))
        .select_from(named.join(t.blobs, t.blobs.c.hash == t.event_blobs.c.blob_hash))
        .where(others, STILL_THERE)
        .group_by(t.events.c.tenant)
    )
    for tenant, num_bytes in connection.execute(of_blobs):
        found[tenant] += num_bytes
    return found


def living(connection: sa.Connection, tenant: TenantId, touched: Collection[type[AnyEvent]]) -> Amounts:
    """The tenant's living things of the sorts that these kinds of events add to."""
    values = {"tenant": tenant, "now_us": time.time_ns() // 1000}
    found: dict[str, int] = {}
    if kinds.AddLoraRequested in touched:
        number, parameters = connection.execute(_ADAPTERS, values).one()
        found |= {"adapters": int(number), "adapter_bytes": BYTES_PER_PARAMETER * int(parameters)}
    if kinds.SessionStarted in touched:
        found["sessions"] = int(connection.execute(_SESSIONS, values).scalar_one())
    if kinds.SamplerCreated in touched:
        found["samplers"] = int(connection.execute(_SAMPLERS, values).scalar_one())
    if kinds.SaveRequested in touched or kinds.CheckpointCopied in touched:
        pending, parameters = connection.execute(_SAVES, values).one()
        kept = int(connection.execute(_CHECKPOINTS, values).scalar_one())
        # What is being saved has no bytes yet, and will.
        found |= {"checkpoints": kept + int(pending), "stored_bytes": saved_bytes(int(parameters), True)}
    return Amounts(**found)
