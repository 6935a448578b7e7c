"""The event store: append (atomic, idempotent, fenced), read, subscribe, leases. Synchronous and thread-safe."""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tinkerbell.config import Settings
from tinkerbell.errors import Corrupt, SchemaOutdated, ServerError, StorageUnavailable, Unavailable
from tinkerbell.events import audit, check, codec, leases, outcomes, reading, schema, seals
from tinkerbell.events.audit import Audit
from tinkerbell.events.blobs import BlobFile, BlobStore
from tinkerbell.events.check import CheckReport
from tinkerbell.events.check_seals import KeptSeal
from tinkerbell.events.codec import Prepared
from tinkerbell.events.engine import make_engine, parse_url, snapshot, sqlite_path
from tinkerbell.events.kinds import Body, LogSealed, NewEvent, Recorded, type_of
from tinkerbell.events.leases import Claim, Lease, LeaseCall, Renewal
from tinkerbell.events.outcomes import Waiter
from tinkerbell.events.queries import Queries
from tinkerbell.events.removal import why_blob_gone, why_gone
from tinkerbell.events.retention import Retention
from tinkerbell.events.state import Original
from tinkerbell.events.storage import StorageReport, survey
from tinkerbell.events.sweeping import Sweeper
from tinkerbell.events.tables import log_head
from tinkerbell.events.tail import Callback, Tail
from tinkerbell.events.vault import Vault
from tinkerbell.events.writer import GROUP_EVENTS, BlobRef, Entry, Item, Writer
from tinkerbell.files import make_directory, tighten
from tinkerbell.types import SYSTEM_TENANT

log = logging.getLogger(__name__)


class EventStore:
    """One process's way to the log. Any number of threads may use it, and any number of processes the database."""

    def __init__(
        self,
        writer: sa.Engine,
        reader: sa.Engine,
        blobs: BlobStore,
        vault: Vault,
        settings: Settings,
        group_events: int,
    ) -> None:
        self._write_engine = writer
        self._read_engine = reader
        self._blobs = blobs
        self._vault = vault
        self._encrypt = settings.encryption == "on"
        self.sweeper = Sweeper(writer, reader, blobs)
        """Takes files that no event needs out of the blob store."""
        self.retention = Retention(writer, reader, self.sweeper, self.append, vault)
        """Erasing tenants, compacting old bulk."""
        self._tail = Tail(reader)
        drop, keys = self.sweeper.drop, partial(vault.commit_keys, make=self._encrypt)
        self._writer = Writer(
            writer, self._tail.push, drop, blobs, limits=settings.limits, keys=keys, group_events=group_events
        )
        self.dialect = writer.dialect.name
        """`sqlite` or `postgresql`."""
        self.queries = Queries(reader)
        """Read-only questions to the projections."""

    @classmethod
    def open(cls, settings: Settings, *, group_events: int = GROUP_EVENTS) -> "EventStore":
        """The store of these settings. `group_events`: most events in one transaction; 1 turns group commit off.

        Raises SchemaOutdated, Unavailable when there is no connection, MissingPackage without the driver.
        """
        try:
            current = schema.is_current(settings.url)
        except (Unavailable, sa.exc.DatabaseError) as exc:
            raise Unavailable(f"the database cannot be used: {exc.__cause__ or exc}") from exc
        if not current:
            raise SchemaOutdated(
                "the database schema is not the one this release needs; run `tinkerbell db upgrade`"
                " with the same settings, after a backup"
            )
        make_directory(settings.blob_dir)
        for path, still in tighten(_files(settings)):
            if still:
                log.warning("others than its owner, another user, can read it path=%s", path)
            else:
                log.warning("others could read it; now its owner alone can path=%s", path)
        writer = make_engine(settings.url, role="writer", durability=settings.durability)
        reader = make_engine(settings.url, role="reader")
        vault = Vault(reader, settings.key_path, writer=writer)
        return cls(writer, reader, BlobStore(settings.blob_dir), vault, settings, group_events)

    def close(self) -> None:
        """Write what was submitted, then stop. Submits after this fail with Unavailable."""
        self._writer.close()
        self._tail.close()
        self._write_engine.dispose()
        self._read_engine.dispose()

    def failure(self) -> ServerError | None:
        """Why nothing can be appended or handed over any more; None as long as it can."""
        for thread, alive in (("writer", self._writer.alive), ("tail", self._tail.alive)):
            if not alive:
                return ServerError(f"the {thread} thread of the event store has ended")
        return None

    def require_keys(self) -> None:
        """Raise KeyUnavailable where the key file does not fit the log, before somebody depends on it."""
        self._vault.require()

    # ---- append ----------------------------------------------------------------------------------------------------

    def submit(self, *events: NewEvent) -> Future[list[Recorded]]:
        """Append these events together, or none of them; the future is done when they are durable.

        Encodes bodies and writes blobs on the calling thread. A request whose idempotency key is known gives the
        event that was recorded for it the first time. Nothing happened when the future raises: NotFound,
        IdempotencyConflict, SequenceConflict, Conflict, Fenced, AlreadyAnswered, InvalidRequest, or Unavailable
        (without a connection the outcome can be unknown: submit again with the same idempotency key).
        """
        future: Future[list[Recorded]] = Future()
        self._put(future, events)
        return future

    def submit_from(self, loop: asyncio.AbstractEventLoop, *events: NewEvent) -> asyncio.Future[list[Recorded]]:
        """`submit` with a future of this event loop, from any thread. The loop is woken once for all the futures that
        one transaction settles."""
        future: asyncio.Future[list[Recorded]] = asyncio.Future(loop=loop)
        self._put(future, events)
        return future

    def append(self, *events: NewEvent) -> list[Recorded]:
        """`submit`, and wait. Raises what its future raises."""
        return self.submit(*events).result()

    def _put(self, waiter: Waiter, events: Sequence[NewEvent]) -> None:
        written: list[BlobFile] = []
        try:
            items = [self._item(new, written) for new in events]
        except Exception as exc:  # noqa: BLE001 - handed to the waiter
            outcomes.deliver([(waiter, exc)])
            self.sweeper.drop(written)
            return
        if items:
            self._writer.put(Entry(waiter, items))
        else:
            outcomes.deliver([(waiter, [])])

    def takes(self, new: NewEvent) -> bool:
        """Whether the event can be stored, whatever the log's rules say to it then."""
        try:
            self._prepared(new)
        except Exception:  # noqa: BLE001 - whatever it is, `submit` raises it
            return False
        return True

    def _prepared(self, new: NewEvent) -> Prepared:
        return codec.prepare(new, partial(self._vault.seal, new.tenant) if self._encrypt else None)

    def _item(self, new: NewEvent, written: list[BlobFile]) -> Item:
        """`written` gets the files that are made for it, also where it raises."""
        prepared = self._prepared(new)
        refs: dict[str, BlobRef] = {}
        try:
            for name, data in prepared.blobs.items():
                digest, file = self._blobs.add(data)
                refs[name] = BlobRef(digest, len(data), file)
                if file is not None:
                    written.append(file)
        except OSError as exc:
            log.error("the blob store did not take a write: %s", exc)
            raise StorageUnavailable("the blob store did not take the write") from exc
        return Item(codec.without_bulk(prepared), refs)

    # ---- read ------------------------------------------------------------------------------------------------------

    def at(self, positions: Collection[int]) -> list[Recorded]:
        """The events at these positions, by position, without inline bodies, as `read` gives them."""
        with self._read_engine.connect() as connection:
            return reading.at_positions(connection, positions, bodies=False)

    def get(self, position: int) -> Recorded | None:
        """The event at a position."""
        with self._read_engine.connect() as connection:
            found = reading.at_positions(connection, [position])
        return found[0] if found else None

    def read(
        self,
        after: int = 0,
        *,
        limit: int = 1000,
        tenant: str | None = None,
        adapter: str | None = None,
        types: Collection[str] | None = None,
        bodies: bool = True,
    ) -> list[Recorded]:
        """At most `limit` events with a position above `after`, by position. Without `bodies` those that are inline are
        left out, until somebody asks for one with `body`."""
        with self._read_engine.connect() as connection:
            return reading.page(connection, after, limit, tenant=tenant, adapter=adapter, types=types, bodies=bodies)

    def read_back(
        self, *, before: int | None = None, limit: int, adapter: str, types: Collection[str]
    ) -> list[Recorded]:
        """At most `limit` events of an adapter with a position below `before` (None: the newest), newest first."""
        with self._read_engine.connect() as connection:
            return reading.page_back(connection, before, limit, adapter=adapter, types=types)

    def original(self, tenant: str, idempotency_key: str) -> Original | None:
        """The request that a tenant's idempotency key stands for."""
        with self._read_engine.connect() as connection:
            return reading.original(connection, tenant, idempotency_key)

    def originals(self, tenant: str, idempotency_keys: Collection[str]) -> dict[str, Recorded]:
        """Key -> the event that was recorded for it, of these of a tenant's keys that have one."""
        with self._read_engine.connect() as connection:
            return reading.originals(connection, tenant, idempotency_keys)

    def audited(self, tenant: str, types: Collection[str], span_us: tuple[int, int], limit: int) -> list[Recorded]:
        """At most `limit` of the tenant's events of these types, which are of audited.AUDITED_TYPES, recorded in
        [begin, end), by time."""
        with self._read_engine.connect() as connection:
            return reading.audited(connection, tenant, types, span_us, limit)

    def head(self) -> int:
        """The last position; 0 for an empty log."""
        with self._read_engine.connect() as connection:
            return int(connection.execute(sa.select(log_head.c.position)).scalar_one())

    def body(self, recorded: Recorded) -> Body | None:
        """The event's body; None where its type has none. Raises Corrupt when it is not what was written, Erased,
        Compacted, KeyUnavailable."""
        if recorded.body_codec is None:
            return None
        if "body" in recorded.blobs:
            stored = self._stored_blob(recorded.blobs["body"])
            return codec.decode_body(type_of(recorded.event), recorded.body_codec, self._vault.open(stored))
        stored = recorded.body if recorded.body is not None else self._inline_body(recorded.position)
        if not codec.has_hash(stored, recorded.body_hash):
            raise Corrupt(f"the body of event {recorded.position} has other bytes than were written")
        return codec.decode_body(type_of(recorded.event), recorded.body_codec, self._vault.open(stored))

    def blob(self, digest: str) -> bytes:
        """What the blob with this sha256 (hex, of the bytes as stored) holds. Raises Corrupt when it is missing or
        changed, Erased, Compacted, KeyUnavailable."""
        return self._vault.open(self._stored_blob(digest))

    def authenticate(self, data: bytes) -> bytes:
        """[32] HMAC-SHA256 that only who has the key file can make. Raises KeyUnavailable."""
        return self._vault.authenticate(data)

    def require_blobs(self, digests: Collection[str]) -> None:
        """Raise Erased or Compacted where one of these blobs was removed."""
        for digest in digests:
            if not self._blobs.exists(digest):
                self._stored_blob(digest)

    def _stored_blob(self, digest: str) -> bytes:
        try:
            return self._blobs.get(digest)
        except Corrupt as exc:
            with self._read_engine.connect() as connection:
                raise why_blob_gone(connection, digest) or exc from exc

    def _inline_body(self, position: int) -> bytes:
        with self._read_engine.connect() as connection:
            stored = reading.body_at(connection, position)
            if stored is None:
                raise why_gone(connection, position) or Corrupt(f"event {position} has lost its body")
        return stored

    def subscribe(self, callback: Callback, *, after: int | None = None) -> Callable[[], None]:
        """Call back with every committed event above `after` (default: from now on), of any process, exactly once
        and in order, on the store's tail thread. Returns the way to end it. Inline bodies are there of what this
        process commits; `body` reads the others.

        What this process commits is handed over at once, others' events within 250 ms. A callback must not block:
        all subscribers share the thread.
        """
        return self._tail.subscribe(callback, self.head() if after is None else after)

    # ---- leases ----------------------------------------------------------------------------------------------------

    def acquire_lease(self, resource: str, holder: str, ttl_s: float) -> Lease | None:
        """The lease with a new epoch if it is free or expired, or its holder (as named by holders.py) has ended; None
        while anybody holds it, the same holder too."""
        lease: Lease | None = self._call(Claim(resource, holder, int(ttl_s * 1_000_000)))
        return lease

    def renew_lease(self, lease: Lease, ttl_s: float) -> bool:
        """Keep the lease for `ttl_s` from now; False when somebody else has it. It may have run out in between as
        long as nobody took it: the epoch decides."""
        return self._renew(lease, int(ttl_s * 1_000_000))

    def is_held(self, resource: str) -> bool:
        """Whether anybody holds the lease now. Raises Unavailable."""
        try:
            with self._read_engine.connect() as connection:
                return leases.is_held(connection, resource)
        except sa.exc.SQLAlchemyError as exc:
            raise Unavailable("the database does not answer") from exc

    def release_lease(self, lease: Lease) -> None:
        """Give the lease back; nothing happens when it is lost already."""
        self._renew(lease, 0)

    def _renew(self, lease: Lease, ttl_us: int) -> bool:
        return bool(self._call(Renewal(lease, ttl_us)))

    def _call(self, call: LeaseCall) -> Any:
        future: Future[Any] = Future()
        self._writer.put(Entry(future, lease_call=call))
        return future.result()

    # ---- seals and the check -----------------------------------------------------------------------------------------

    def seal(self, *, actor: str | None = None, fence: tuple[str, int] | None = None) -> LogSealed | None:
        """Seal the log as it is now; None, and nothing written, when nothing has happened since the last seal."""
        with snapshot(self._read_engine) as connection:
            sealed = seals.seal(connection)
        if sealed is not None:
            self.append(NewEvent(event=sealed, tenant=SYSTEM_TENANT, stream=seals.STREAM, actor=actor, fence=fence))
        return sealed

    def newest_seal(self) -> LogSealed | None:
        """The last seal that was written."""
        with self._read_engine.connect() as connection:
            found = seals.newest(connection)
        return found.event if found is not None and isinstance(found.event, LogSealed) else None

    def last_sealed_us(self) -> int | None:
        """When the log was last sealed, microseconds since 1970; where it never was, when it began; None: it is
        empty."""
        with self._read_engine.connect() as connection:
            return seals.last_sealed_us(connection)

    def storage(self) -> StorageReport:
        """What the blob store has, against what the log names. Reads names and sizes, no contents."""
        with snapshot(self._read_engine) as connection:
            return survey(connection, self._blobs)

    def check(self, *, seal: KeptSeal | None = None) -> CheckReport:
        """Verify the whole log, its blobs, its projections and its seals in one snapshot; `seal`: compare with a root
        that was kept elsewhere, too.

        What is as it was written and cannot be read by this release is in the report, with its position. Raises Corrupt
        naming the invariant and the position of what is not. Reads everything: minutes for a large log.
        """
        with snapshot(self._read_engine) as connection:
            return check.check(connection, self._blobs, self._vault, seal)

    def audit(self, *, seal: KeptSeal | None = None, with_keys: bool = True) -> Audit:
        """`check`, and whether the schema is what the migrations make, every data key opens, and every event was
        written by who has the key file; `with_keys` false leaves out what needs that file. Raises as `check` does."""
        return audit.audit(
            self._write_engine, self._read_engine, self._blobs, self._vault, kept=seal, with_keys=with_keys
        )


def _files(settings: Settings) -> list[Path]:
    """What there is of a log outside of Postgres."""
    found = [Path(settings.data_dir), settings.blob_dir]
    if (database := sqlite_path(parse_url(settings.url))) is not None:
        found += [database, *(database.with_name(database.name + end) for end in ("-wal", "-shm", "-journal"))]
    return found
