"""The one thread that appends: takes what is queued, writes it in one transaction, answers the submitters.

Group commit without a timer: while one transaction is being made durable the next group gathers. A submit is all or
nothing, and a refused one leaves the others of its group untouched.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from tinkerbell.config import Limits
from tinkerbell.errors import InvalidRequest, StorageUnavailable, TinkerbellError, Unavailable
from tinkerbell.events import facts, holdings, leases, outcomes, stopped
from tinkerbell.events.blobs import BlobFile, BlobStore
from tinkerbell.events.codec import Prepared
from tinkerbell.events.commits import mac_of
from tinkerbell.events.key_file import Keys
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.leases import Claim, LeaseCall, Renewal
from tinkerbell.events.outcomes import Outcome, Waiter
from tinkerbell.events.projections import fold
from tinkerbell.events.projector import project
from tinkerbell.events.rules import Admitted, admit
from tinkerbell.events.state import LeaseFacts, State
from tinkerbell.events.statements import Statements
from tinkerbell.events.tables import blobs, commit_macs, event_blobs, events, log_head, stored, streams
from tinkerbell.types import SYSTEM_TENANT

log = logging.getLogger(__name__)

GROUP_EVENTS = 512
"""Most events in one transaction, unless a single submit has more."""
GROUP_BYTES = 8 * 1024 * 1024


class BlobRef(msgspec.Struct, frozen=True):
    """A blob that is durable."""

    hash: bytes
    length: int
    file: BlobFile | None = None
    """What was written for it; None where it was there before."""


class Item(msgspec.Struct, frozen=True):
    """An event ready to be written; its blobs are in the blob store."""

    prepared: Prepared
    blobs: dict[str, BlobRef]

    @property
    def names_blobs(self) -> bool:
        """Its own, or some that another event brought."""
        return bool(self.blobs or self.prepared.new.shared)


class Entry:
    """One submit: events that enter together, or a call on a lease."""

    __slots__ = ("items", "lease_call", "num_bytes", "num_events", "waiter")

    def __init__(self, waiter: Waiter, items: Sequence[Item] = (), lease_call: LeaseCall | None = None) -> None:
        self.waiter = waiter
        self.items = items
        self.lease_call = lease_call
        self.num_events = max(1, len(items))
        self.num_bytes = sum(item.prepared.num_bytes for item in items)

    @property
    def files(self) -> list[BlobFile]:
        """That were written for it."""
        return [ref.file for item in self.items for ref in item.blobs.values() if ref.file is not None]


class _Group:
    """What one transaction is about to do."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.admitted: list[Admitted] = []
        self.lengths: dict[bytes, int] = {}
        """Of new blobs, by hash."""
        self.stored: dict[str, int] = {}
        """Tenant -> bytes that are stored more than before."""
        self.outcomes: list[Outcome] = []
        """Of each entry."""
        self.expiries: list[tuple[Entry, leases.Lease, int]] = []


class _OutcomeUnknownError(Exception):
    """Nobody can say whether the transaction was committed, so it must not be tried again."""


class Writer:
    """Owns the write connection. `on_commit` gets the events of each transaction after it is durable, `on_refused` the
    files of submits that came to nothing, `keys` are what transactions are authenticated with."""

    def __init__(
        self,
        engine: sa.Engine,
        on_commit: Callable[[list[Recorded]], None],
        on_refused: Callable[[Sequence[BlobFile]], None],
        blobs: BlobStore,
        *,
        limits: Limits,
        keys: Callable[[], Keys | None] = lambda: None,
        group_events: int = GROUP_EVENTS,
    ) -> None:
        """`limits`: of tenants that have none of their own."""
        self._engine = engine
        self._limits = limits
        stopped.expect(engine)
        self._on_commit = on_commit
        self._on_refused = on_refused
        self._blobs = blobs
        self._keys = keys
        self._group_events = group_events
        self._queue: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._held: Entry | None = None
        """Taken from the queue, but too much for the group."""
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tinkerbell-writer", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Queue a submit; its waiter gets the outcome."""
        with self._closing:
            if not self._closed:
                self._queue.put(entry)
                return
        outcomes.deliver([(entry.waiter, Unavailable("the event store is closed"))])

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Write what is queued, then end the thread."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while group := self._take():
            # A submit cancelled before this line never happened; from here on it cannot be cancelled.
            running = [entry for entry in group if outcomes.is_wanted(entry.waiter)]
            try:
                named = self._write(running) if running else set()
                if files := [
                    file for entry in group for file in entry.files if bytes.fromhex(file.digest) not in named
                ]:
                    self._on_refused(files)
            except Exception:
                # Whoever comes next has no part in it. What became of these nobody knows; their files stay.
                log.exception("%d submits broke the writer", len(running))
                unknown = Unavailable("the event store broke off; what was asked may have been done")
                outcomes.deliver_rest([(entry.waiter, unknown) for entry in running])

    def _take(self) -> list[Entry]:
        """The next group; empty when the store is closed and everything is written."""
        first, self._held = self._held or self._queue.get(), None
        if first is None:
            return []
        group, num_events, num_bytes = [first], first.num_events, first.num_bytes
        while num_events < self._group_events:
            try:
                entry = self._queue.get_nowait()
            except queue.Empty:
                break
            if entry is None:
                self._queue.put(None)
                break
            num_events += entry.num_events
            num_bytes += entry.num_bytes
            if num_events > self._group_events or num_bytes > GROUP_BYTES:
                self._held = entry
                break
            group.append(entry)
        return group

    def _write(self, entries: list[Entry]) -> set[bytes]:
        """Hashes of the blobs that were written with what was admitted."""
        try:
            done = self._transact(entries)
        except _OutcomeUnknownError as exc:
            log.error("%d submits may have been written or not: %s", len(entries), exc.__cause__)
            unknown = Unavailable("the database broke off while it committed; what was asked may have been done")
            unknown.__cause__ = exc.__cause__
            outcomes.deliver([(entry.waiter, unknown) for entry in entries])
            return set()
        except Exception as exc:  # noqa: BLE001 - handed to the submitter, or tried again one by one
            if len(entries) > 1:
                why = getattr(exc, "orig", exc)
                log.warning("a group of %d submits was rolled back, writing them one by one: %s", len(entries), why)
                return {digest for entry in entries for digest in self._write([entry])}
            outcomes.deliver([(entries[0].waiter, self._as_ours(exc))])
            return set()
        if done.admitted:
            self._on_commit([admitted.recorded for admitted in done.admitted])
        outcomes.deliver(done.outcomes)
        return set(done.lengths)

    def _transact(self, entries: list[Entry]) -> _Group:
        try:
            return self._attempt(entries)
        except Exception as exc:
            if not stopped.is_suspected(exc):
                raise
        stopped.end(self._engine)
        return self._attempt(entries)

    def _attempt(self, entries: list[Entry]) -> _Group:
        with self._engine.connect() as connection:
            transaction = connection.begin()
            statements = Statements(connection)
            group = self._plan(connection, statements, entries)
            if group.admitted:
                for tenant, less in holdings.leaving(connection, (each.recorded for each in group.admitted)).items():
                    group.stored[tenant] = group.stored.get(tenant, 0) - less
                _insert(statements, group)
                self._authenticate(statements, group)
            for entry, lease, ttl_us in group.expiries:
                kept = leases.renew(connection, lease, ttl_us)
                if isinstance(entry.lease_call, Renewal):
                    group.outcomes.append((entry.waiter, kept))
            try:
                transaction.commit()
            except sa.exc.DBAPIError as exc:
                failure = exc
            else:
                return group
        try:
            happened = self._is_durable(group)
        except Exception as exc:
            raise _OutcomeUnknownError from exc
        if not happened:
            raise failure
        return group

    def _authenticate(self, statements: Statements, group: _Group) -> None:
        if (keys := self._keys()) is None:
            return
        first, last = group.admitted[0].row["position"], group.admitted[-1].row["position"]
        mac = mac_of(keys, first, [item.row["hash"] for item in group.admitted])
        statements.insert(commit_macs, [{"position": last, "first": first, "mac": mac}])

    def _is_durable(self, group: _Group) -> bool:
        """Whether a commit that ended in an error happened nevertheless, as when the connection broke after it.

        Taking the append lock first waits for the server to be done with the old connection.
        """
        if not group.admitted:
            return False
        last = group.admitted[-1].row
        with self._engine.begin() as connection:
            facts.lock_head(Statements(connection))
            found = connection.execute(sa.select(events.c.hash).where(events.c.position == last["position"])).scalar()
        return bool(found == last["hash"])

    def _plan(self, connection: sa.Connection, statements: Statements, entries: list[Entry]) -> _Group:
        position = facts.lock_head(statements)
        prepared = [item.prepared for entry in entries for item in entry.items]
        calls = [entry.lease_call for entry in entries if entry.lease_call is not None]
        claimed = {call.resource for call in calls if isinstance(call, Claim)}
        group = _Group(facts.read_state(connection, statements, position, prepared, claimed, self._limits))
        now_us = time.time_ns() // 1000
        for entry in entries:
            match entry.lease_call:
                case None:
                    self._admit(group, entry, entry.items, now_us)
                case Renewal() as call:
                    group.expiries.append((entry, call.lease, call.ttl_us))
                case Claim() as call:
                    self._claim(connection, group, entry, call, now_us)
        return group

    def _admit(self, group: _Group, entry: Entry, items: Sequence[Item], now_us: int) -> bool:
        """Admit all the items or none. Where the last is there already, those before it are as well, or were made for
        a retry that needs them no more: nothing is added."""
        # A single event changes nothing when the rules refuse it.
        state = group.state if len(items) == 1 and not items[0].names_blobs else group.state.fork()
        admitted: list[Admitted] = []
        recorded: list[Recorded] = []
        lengths: dict[bytes, int] = {}
        grown: dict[str, int] = {}
        try:
            for item in items:
                hashes = {name: bytes.fromhex(digest) for name, digest in item.prepared.new.shared.items()}
                hashes |= {name: ref.hash for name, ref in item.blobs.items()}
                num_bytes = item.prepared.num_bytes + sum(ref.length for ref in item.blobs.values())
                num_bytes += sum(state.blobs.get(bytes.fromhex(d), 0) for d in item.prepared.new.shared.values())
                placed = admit(state, item.prepared, hashes, num_bytes, now_us)
                if isinstance(placed, Admitted):
                    self._require(placed.blobs)
                    admitted.append(placed)
                    tenant = placed.recorded.tenant
                    grown[tenant] = grown.get(tenant, 0) + num_bytes
                    lengths |= {ref.hash: ref.length for ref in item.blobs.values()}
                recorded.append(placed.recorded if isinstance(placed, Admitted) else placed)
        except (TinkerbellError, TypeError) as exc:
            group.outcomes.append((entry.waiter, exc))
            return False
        if isinstance(placed, Admitted):
            if state is not group.state:
                group.state.merge(state)
            group.admitted += admitted
            group.lengths |= lengths
            for tenant, more in grown.items():
                if tenant != SYSTEM_TENANT:
                    group.stored[tenant] = group.stored.get(tenant, 0) + more
        if entry.lease_call is None:
            group.outcomes.append((entry.waiter, recorded))
        return True

    def _require(self, blobs: dict[str, bytes]) -> None:
        """Under the append lock, under which files are removed. Raises Unavailable."""
        for name, digest in blobs.items():
            if not self._blobs.exists(digest.hex()):
                raise StorageUnavailable(f"the blob {digest.hex()} ({name}) is gone before its event; ask again")

    def _claim(self, connection: sa.Connection, group: _Group, entry: Entry, call: Claim, now_us: int) -> None:
        clock_us = leases.database_now_us(connection)
        granted = leases.grant(call, group.state.leases.get(call.resource), clock_us)
        if granted is None:
            group.outcomes.append((entry.waiter, None))
            return
        lease, prepared = granted
        if self._admit(group, entry, [Item(prepared, {})], now_us):
            group.state.leases[call.resource] = LeaseFacts(lease.holder, lease.epoch, clock_us + call.ttl_us)
            group.expiries.append((entry, lease, call.ttl_us))
            group.outcomes.append((entry.waiter, lease))

    def _as_ours(self, exc: Exception) -> Exception:
        """An error the callers know. The driver's text is only its cause: it can name hosts, not their business."""
        driver: Any = self._engine.dialect.loaded_dbapi
        ours: Exception
        if isinstance(exc, (sa.exc.DataError, driver.DataError, OverflowError)):
            ours = InvalidRequest("the database cannot hold this")
        elif isinstance(exc, (sa.exc.SQLAlchemyError, driver.Error)):
            ours = Unavailable("the database did not take the write")
            log.error("the database did not take a write: %s", getattr(exc, "orig", exc))
        else:
            return exc
        ours.__cause__ = exc
        return ours


def _insert(statements: Statements, group: _Group) -> None:
    """Write the admitted events, what they changed, and the new head."""
    named = [(item, name, digest) for item in group.admitted for name, digest in item.blobs.items()]
    if named:
        now_us = group.admitted[-1].row["created_us"]
        rows = [
            {"hash": digest, "length": length, "location": "file", "created_us": now_us}
            for digest, length in group.lengths.items()
        ]
        if rows:
            # "replace": one that was removed is there again.
            statements.insert(blobs, rows, "replace")
    statements.insert(events, [item.row for item in group.admitted])
    if named:
        statements.insert(
            event_blobs,
            [{"position": item.recorded.position, "name": name, "blob_hash": digest} for item, name, digest in named],
        )
    heads = {
        item.row["stream"]: {
            "stream": item.row["stream"],
            "tenant": item.row["tenant"],
            "version": item.row["stream_version"],
            "head_hash": item.row["hash"],
        }
        for item in group.admitted
    }
    statements.insert(streams, list(heads.values()), "replace")
    if group.stored:
        rows = [{"tenant": tenant, "num_bytes": num_bytes} for tenant, num_bytes in group.stored.items()]
        statements.insert(stored, rows, "add")
    project(statements, (change for item in group.admitted for change in fold(item.recorded, item.cause)))
    statements.update(log_head, [{"id": 1, "position": group.state.position}])
