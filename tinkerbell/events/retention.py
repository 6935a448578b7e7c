"""Erasing a tenant and compacting old bulk: nobody else may write to the log meanwhile, so hold the scheduler's lease.
And taking out superseded recovery points, beside others.

All of them append an event that says what goes, and then take it out: bodies from their rows, blobs from the store, and
for an erasure the keys before all. Whatever ends the process in between, doing it again finishes it.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import sqlalchemy as sa

from tinkerbell.errors import Conflict, KeyUnavailable, NotFound
from tinkerbell.events import removal
from tinkerbell.events.engine import snapshot
from tinkerbell.events.kinds import BulkCompacted, KeyRevoked, NewEvent, Recorded, TenantErased
from tinkerbell.events.old_copies import outside_of_transactions, rewrite, write_over_wal
from tinkerbell.events.removal import Bulk
from tinkerbell.events.rows import DisposableRow
from tinkerbell.events.sweeping import Sweeper, Swept
from tinkerbell.events.tables import adapters, api_keys, checkpoints, data_keys, erasures, events, futures
from tinkerbell.events.vault import Vault
from tinkerbell.types import SYSTEM_TENANT, TenantId

Tell = Callable[[str, float, float], None]
"""(what is done, done, total)."""
Append = Callable[..., list[Recorded]]
Fence = tuple[str, int]

POSITIONS_AT_ONCE = 1000
"""Most events that one bulk.compacted is about."""


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """What was taken out just now."""

    bulk: Bulk
    position: int | None
    """Of the event that says so; None: nothing new was to be removed."""
    num_keys_destroyed: int = 0
    num_keys_revoked: int = 0
    """API keys."""
    num_adapters: int = 0
    num_checkpoints: int = 0
    num_files: int = 0
    """Blobs deleted: one that others name as well stays."""
    num_keys_rewrapped: int | None = None
    """Data keys of others that were wrapped anew under a new key in the key file, so that no copy of an old wrapped key
    opens anything; None: they were not."""
    key_file: str | None = None
    """The file that has a new key since."""
    left: tuple[str, ...] = ()
    """What of it may still be readable somewhere that this could reach, and why."""


class Retention:
    """Works on the engines of one store."""

    def __init__(
        self,
        writer: sa.Engine,
        reader: sa.Engine,
        sweeper: Sweeper,
        append: Append,
        vault: Vault,
    ) -> None:
        self._writer = writer
        self._reader = reader
        self._sweeper = sweeper
        self._append = append
        self._vault = vault

    def erase(self, tenant: TenantId, *, actor: str, fence: Fence, tell: Tell) -> Removal:
        """Make all that the tenant has stored unreadable and take it out.

        Raises NotFound for a tenant that the log has nothing of, Conflict while it has pending requests.
        """
        with snapshot(self._reader) as connection:
            event, keys, anything = self._plan_erasure(connection, tenant)
        position = None
        bulk = Bulk(num_bodies=event.num_bodies, num_blobs=event.num_blobs, num_bytes=event.num_bytes)
        if anything:
            stream = f"tenant/{tenant}"
            said = [KeyRevoked(key_id=key) for key in keys]
            news = [NewEvent(event=each, tenant=tenant, stream=stream, actor=actor, fence=fence) for each in said]
            erased = NewEvent(event=event, tenant=tenant, stream=stream, actor=actor, fence=fence)
            position = self._append(*news, erased)[-1].position
        num_keys, num_files = self._take_out(tell)
        self._vault.forget(tenant)
        left: list[str] = []
        num_rewrapped = self._rewrap(left)
        tell("rewriting the database", 0, 1)
        rewrite(self._writer, self._reader, (events, data_keys))
        if (why := write_over_wal(self._reader, partial(tell, "writing over old logs"))) is not None:
            left.append(f"old segments of pg_wal still have the wrapped keys, and what was stored unencrypted: {why}")
        return Removal(
            num_keys_rewrapped=num_rewrapped,
            key_file=None if num_rewrapped is None else str(self._vault.path),
            left=tuple(left),
            bulk=bulk,
            position=position,
            num_keys_destroyed=num_keys,
            num_keys_revoked=len(keys),
            num_adapters=len(event.adapters),
            num_checkpoints=len(event.checkpoints),
            num_files=num_files,
        )

    def _rewrap(self, left: list[str]) -> int | None:
        """How many keys; adds to `left` why not."""
        try:
            return self._vault.rewrap()
        except (KeyUnavailable, OSError) as exc:
            left.append(
                "the other data keys were not wrapped under a new key file, so that a copy of the database from before"
                f" and the key file {self._vault.path} still open what was erased: {exc}"
            )
            return None

    def plan(self, tenant: TenantId) -> TenantErased:
        """What `erase` would say. Raises as it does."""
        with snapshot(self._reader) as connection:
            return self._plan_erasure(connection, tenant)[0]

    def compact(
        self, tenant: TenantId, positions: Sequence[int], before_us: int, *, actor: str, fence: Fence, tell: Tell
    ) -> Bulk:
        """Take out the bodies and blobs of these events of a tenant. What of it is gone already is not counted."""
        total = Bulk()
        for start in range(0, len(positions), POSITIONS_AT_ONCE):
            tell(f"compacting {tenant}", start, len(positions))
            with self._reader.connect() as connection:
                part = removal.with_bulk(connection, positions[start : start + POSITIONS_AT_ONCE])
            if not part:
                continue
            bulk = self.bulk_at(part)
            said = BulkCompacted(before_us=before_us, positions=part, **msgspec.structs.asdict(bulk))
            stream = f"tenant/{tenant}"
            self._append(NewEvent(event=said, tenant=tenant, stream=stream, actor=actor, fence=fence))
            total += bulk
        return total

    def supersede(self, tenant: TenantId, points: Sequence[DisposableRow], *, actor: str, fence: Fence) -> Swept:
        """Take out checkpoints of a tenant that nothing is restored from any more, at most POSITIONS_AT_ONCE, while
        others append. Where it is cut short, the log says already what is gone, and a sweep takes the files."""
        with self._reader.connect() as connection:
            positions = removal.with_bulk(connection, [point.position for point in points])
        said = BulkCompacted(
            before_us=time.time_ns() // 1000,
            positions=positions,
            **msgspec.structs.asdict(self.bulk_at(positions)),
            checkpoints=[point.id for point in points],
        )
        self._append(NewEvent(event=said, tenant=tenant, stream=f"tenant/{tenant}", actor=actor, fence=fence))
        return self._sweeper.remove_digests({digest for point in points for digest in point.blobs.values()})

    def finish_compaction(self, tell: Tell) -> int:
        """Take out what was said to be removed, and give the space back; how many files were deleted."""
        _, num_files = self._take_out(tell)
        tell("rewriting the database", 0, 1)
        rewrite(self._writer, self._reader, (events, data_keys))
        return num_files

    def bulk_at(self, positions: Sequence[int]) -> Bulk:
        """What these events have of bodies and blobs that was not removed yet."""
        total = Bulk()
        with self._reader.connect() as connection:
            for start in range(0, len(positions), POSITIONS_AT_ONCE):
                part = positions[start : start + POSITIONS_AT_ONCE]
                total += removal.bulk_of(connection, events.c.position.in_(part))
        return total

    def _plan_erasure(self, connection: sa.Connection, tenant: TenantId) -> tuple[TenantErased, list[str], bool]:
        """(event, API keys to revoke, whether there is anything to erase)."""
        mine = events.c.tenant == tenant
        known = connection.execute(sa.select(events.c.position).where(mine).limit(1)).first()
        if known is None or tenant == SYSTEM_TENANT:
            raise NotFound(f"the log has nothing of a tenant {tenant}")
        waiting = sa.select(sa.func.count()).where(futures.c.tenant == tenant, futures.c.state == "pending")
        if num_pending := connection.execute(waiting).scalar_one():
            raise Conflict(
                f"{num_pending} requests of tenant {tenant} have no answer yet; let a server answer them, or remove its"
                " adapters, and then stop it"
            )

        def names(column: sa.Column[str], *conditions: sa.ColumnElement[bool]) -> list[str]:
            return list(connection.execute(sa.select(column).where(*conditions).order_by(column)).scalars())

        keys = names(api_keys.c.key_id, api_keys.c.tenant == tenant, api_keys.c.revoked_us.is_(None))
        living = sa.select(data_keys.c.id).where(data_keys.c.tenant == tenant, data_keys.c.wrapped.is_not(None))
        data = [key.hex() for key in connection.execute(living.order_by(data_keys.c.id)).scalars()]
        alive = names(adapters.c.id, adapters.c.tenant == tenant, adapters.c.state == "ready")
        bulk = removal.bulk_of(connection, mine)
        before = connection.execute(sa.select(erasures.c.position).where(erasures.c.tenant == tenant)).scalar() or 0
        event = TenantErased(
            adapters=alive,
            checkpoints=names(checkpoints.c.id, checkpoints.c.tenant == tenant, checkpoints.c.position > before),
            data_keys=data,
            **msgspec.structs.asdict(bulk),
        )
        # Keys of a tenant that was erased before belong to that erasure, which is finished now.
        anything = not before or bool(alive or keys or bulk.num_bodies or bulk.num_blobs)
        return event, keys, anything

    def _take_out(self, tell: Tell) -> tuple[int, int]:
        """(data keys destroyed, files deleted) for whatever the log says is removed."""
        tell("taking bodies out", 0, 1)
        if self._writer.dialect.name == "sqlite":
            outside_of_transactions(self._writer, "PRAGMA secure_delete=ON")
        with self._writer.begin() as connection:
            num_keys = removal.destroy_keys(connection)
            removal.drop_bodies(connection)
            removal.drop_blobs(connection)
        with self._reader.connect() as connection:
            removed = removal.removed_blobs(connection)
        num_files = 0
        for start in range(0, len(removed), POSITIONS_AT_ONCE):
            tell("deleting blobs", start, len(removed))
            num_files += self._sweeper.remove_digests(removed[start : start + POSITIONS_AT_ONCE]).num_files
        return num_keys, num_files
