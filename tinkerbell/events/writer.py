"""The one thread that appends: takes what is queued, writes it in one transaction, answers the submitters.

Group commit without a timer: while one transaction is being made durable the next group gathers. A submit is all or
nothing, and a refused one leaves the others of its group untouched.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from tinkerbell.errors import InvalidRequest, TinkerbellError, Unavailable
from tinkerbell.events import facts, leases
from tinkerbell.events.codec import Prepared
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.leases import Claim, LeaseCall, Renewal
from tinkerbell.events.projections import fold
from tinkerbell.events.projector import project, upsert
from tinkerbell.events.rules import Admitted, LeaseFacts, State, admit
from tinkerbell.events.tables import blobs, event_blobs, events, log_head, streams

log = logging.getLogger(__name__)

GROUP_EVENTS = 512
"""Most events in one transaction, unless a single submit has more."""
GROUP_BYTES = 8 * 1024 * 1024

_INSERT_EVENTS = events.insert()
_INSERT_EVENT_BLOBS = event_blobs.insert()
_MOVE_HEAD = log_head.update().values(position=sa.bindparam("head"))


class BlobRef(msgspec.Struct, frozen=True):
    """A blob that is durable."""

    hash: bytes
    length: int


class Item(msgspec.Struct, frozen=True):
    """An event ready to be written; its blobs are in the blob store."""

    prepared: Prepared
    blobs: dict[str, BlobRef]


class Entry:
    """One submit: events that enter together, or a call on a lease."""

    def __init__(self, items: Sequence[Item] = (), lease_call: LeaseCall | None = None) -> None:
        self.items = items
        self.lease_call = lease_call
        self.future: Future[Any] = Future()
        self.num_events = max(1, len(items))
        self.num_bytes = sum(item.prepared.num_bytes for item in items)


class _Group:
    """What one transaction is about to do."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.admitted: list[Admitted] = []
        self.lengths: dict[bytes, int] = {}
        self.outcomes: list[tuple[Entry, Any]] = []
        """Result or exception of each entry."""
        self.expiries: list[tuple[Entry, leases.Lease, int]] = []


class Writer:
    """Owns the write connection. `on_commit` gets the events of each transaction after it is durable."""

    def __init__(
        self,
        engine: sa.Engine,
        on_commit: Callable[[list[Recorded]], None],
        *,
        group_events: int = GROUP_EVENTS,
    ) -> None:
        self._engine = engine
        self._on_commit = on_commit
        self._group_events = group_events
        self._queue: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._held: Entry | None = None
        """Taken from the queue, but too much for the group."""
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tinkerbell-writer", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Queue a submit; its future gets the outcome."""
        with self._closing:
            if not self._closed:
                self._queue.put(entry)
                return
        entry.future.set_exception(Unavailable("the event store is closed"))

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
            running = [entry for entry in group if entry.future.set_running_or_notify_cancel()]
            if running:
                self._write(running)

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

    def _write(self, entries: list[Entry]) -> None:
        try:
            done = self._transact(entries)
        except Exception as exc:  # noqa: BLE001 - handed to the submitter, or tried again one by one
            if len(entries) > 1:
                why = getattr(exc, "orig", exc)
                log.warning("a group of %d submits was rolled back, writing them one by one: %s", len(entries), why)
                for entry in entries:
                    self._write([entry])
            else:
                entries[0].future.set_exception(_as_ours(exc))
            return
        if done.admitted:
            self._on_commit([admitted.recorded for admitted in done.admitted])
        for entry, outcome in done.outcomes:
            if isinstance(outcome, BaseException):
                entry.future.set_exception(outcome)
            else:
                entry.future.set_result(outcome)

    def _transact(self, entries: list[Entry]) -> _Group:
        with self._engine.connect() as connection:
            transaction = connection.begin()
            group = self._plan(connection, entries)
            if group.admitted:
                _insert(connection, group)
            for entry, lease, ttl_us in group.expiries:
                kept = leases.renew(connection, lease, ttl_us)
                if isinstance(entry.lease_call, Renewal):
                    group.outcomes.append((entry, kept))
            try:
                transaction.commit()
            except sa.exc.DBAPIError as exc:
                failure = exc
            else:
                return group
        if not self._is_durable(group):
            raise failure
        return group

    def _is_durable(self, group: _Group) -> bool:
        """Whether a commit that ended in an error happened nevertheless, as when the connection broke after it.

        Taking the append lock first waits for the server to be done with the old connection.
        """
        if not group.admitted:
            return False
        last = group.admitted[-1].row
        with self._engine.begin() as connection:
            facts.lock_head(connection)
            found = connection.execute(sa.select(events.c.hash).where(events.c.position == last["position"])).scalar()
        return bool(found == last["hash"])

    def _plan(self, connection: sa.Connection, entries: list[Entry]) -> _Group:
        position = facts.lock_head(connection)
        prepared = [item.prepared for entry in entries for item in entry.items]
        calls = [entry.lease_call for entry in entries if entry.lease_call is not None]
        claimed = {call.resource for call in calls if isinstance(call, Claim)}
        group = _Group(facts.read_state(connection, position, prepared, claimed))
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
        """Admit all the items or none."""
        fork = group.state.fork()
        admitted: list[Admitted] = []
        recorded: list[Recorded] = []
        lengths: dict[bytes, int] = {}
        try:
            for item in items:
                hashes = {name: ref.hash for name, ref in item.blobs.items()}
                placed = admit(fork, item.prepared, hashes, now_us)
                if isinstance(placed, Admitted):
                    admitted.append(placed)
                    lengths |= {ref.hash: ref.length for ref in item.blobs.values()}
                recorded.append(placed.recorded if isinstance(placed, Admitted) else placed)
        except (TinkerbellError, TypeError) as exc:
            group.outcomes.append((entry, exc))
            return False
        group.state.merge(fork)
        group.admitted += admitted
        group.lengths |= lengths
        if entry.lease_call is None:
            group.outcomes.append((entry, recorded))
        return True

    def _claim(self, connection: sa.Connection, group: _Group, entry: Entry, call: Claim, now_us: int) -> None:
        clock_us = leases.database_now_us(connection)
        granted = leases.grant(call, group.state.leases.get(call.resource), clock_us)
        if granted is None:
            group.outcomes.append((entry, None))
            return
        lease, prepared = granted
        if self._admit(group, entry, [Item(prepared, {})], now_us):
            group.state.leases[call.resource] = LeaseFacts(lease.holder, lease.epoch, clock_us + call.ttl_us)
            group.expiries.append((entry, lease, call.ttl_us))
            group.outcomes.append((entry, lease))


def _insert(connection: sa.Connection, group: _Group) -> None:
    """Write the admitted events, what they changed, and the new head."""
    named = [(item, name, digest) for item in group.admitted for name, digest in item.blobs.items()]
    if named:
        insert: Any = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(blobs)
        now_us = group.admitted[-1].row["created_us"]
        rows = [
            {"hash": digest, "length": length, "location": "file", "created_us": now_us}
            for digest, length in group.lengths.items()
        ]
        connection.execute(insert.on_conflict_do_nothing(), rows)
    connection.execute(_INSERT_EVENTS, [item.row for item in group.admitted])
    if named:
        connection.execute(
            _INSERT_EVENT_BLOBS,
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
    upsert(connection, streams, list(heads.values()))
    project(connection, (change for item in group.admitted for change in fold(item.recorded, item.cause)))
    connection.execute(_MOVE_HEAD, {"head": group.state.position})


def _as_ours(exc: Exception) -> Exception:
    """An error the callers know. The driver's text is only its cause: it can name hosts, not their business."""
    ours: Exception
    if isinstance(exc, sa.exc.DataError):
        ours = InvalidRequest("the database cannot hold this")
    elif isinstance(exc, sa.exc.SQLAlchemyError):
        ours = Unavailable("the database did not take the write")
        log.error("the database did not take a write: %s", getattr(exc, "orig", exc))
    else:
        return exc
    ours.__cause__ = exc
    return ours
