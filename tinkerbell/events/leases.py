"""Leases: one holder at a time, an epoch that only grows. Taking one is an event, keeping it alive is not."""

import time

import msgspec
import sqlalchemy as sa

from tinkerbell.events.codec import Prepared, prepare
from tinkerbell.events.holders import has_ended
from tinkerbell.events.kinds import LeaseGranted, NewEvent
from tinkerbell.events.state import LeaseFacts
from tinkerbell.events.tables import leases
from tinkerbell.types import SYSTEM_TENANT

SCHEDULER = "scheduler"
"""The lease of whoever answers requests."""


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """A lease that was granted. Whether it still holds is known at commit only: see NewEvent.fence."""

    resource: str
    holder: str
    epoch: int
    """Fencing token."""


class Claim(msgspec.Struct, frozen=True):
    """Take the lease if it is free or expired, or its holder has ended."""

    resource: str
    holder: str
    ttl_us: int


class Renewal(msgspec.Struct, frozen=True):
    """Keep the lease until `ttl_us` from now; 0 gives it back."""

    lease: Lease
    ttl_us: int


LeaseCall = Claim | Renewal


def database_now_us(connection: sa.Connection) -> int:
    """Microseconds since 1970 by the one clock that all holders share: Postgres's, or this machine's for SQLite."""
    if connection.dialect.name == "sqlite":
        return time.time_ns() // 1000
    clock = sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()) * 1_000_000, sa.BigInteger)
    return int(connection.execute(sa.select(clock)).scalar_one())


def is_held(connection: sa.Connection, resource: str) -> bool:
    """Whether anybody holds the lease now."""
    row = connection.execute(sa.select(leases).where(leases.c.resource == resource)).mappings().first()
    return row is not None and row["expires_us"] > database_now_us(connection) and not has_ended(row["holder"])


def stream_of(resource: str) -> str:
    """The stream that has the grants of a lease."""
    return f"system/{resource}"


def grant(claim: Claim, facts: LeaseFacts | None, now_us: int) -> tuple[Lease, Prepared] | None:
    """The lease and the event that grants it; None while somebody holds it who may still be there."""
    if facts is not None and facts.expires_us > now_us and not has_ended(facts.holder):
        return None
    lease = Lease(resource=claim.resource, holder=claim.holder, epoch=facts.epoch + 1 if facts else 1)
    event = LeaseGranted(resource=lease.resource, holder=lease.holder, epoch=lease.epoch)
    new = NewEvent(event=event, tenant=SYSTEM_TENANT, stream=stream_of(lease.resource), actor=lease.holder)
    return lease, prepare(new)


def renew(connection: sa.Connection, lease: Lease, ttl_us: int) -> bool:
    """Move the expiry, in the caller's transaction; False when the lease has another holder or epoch by now."""
    expires_us = database_now_us(connection) + ttl_us if ttl_us else 0
    done = connection.execute(
        leases.update()
        .where(
            leases.c.resource == lease.resource,
            leases.c.holder == lease.holder,
            leases.c.epoch == lease.epoch,
        )
        .values(expires_us=expires_us)
    )
    return done.rowcount == 1
