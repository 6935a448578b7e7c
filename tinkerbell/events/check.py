"""Verifies the whole log against its invariants, in one pass and one snapshot.

I1  positions are 1..N and log_head says N (so a cursor that is one number misses nothing: I11)
I2  versions of a stream are 0, 1, 2, ... and `streams` has the last one
I3  every hash is the hash of its row and of the one before it
I4  every result answers an earlier request of the same tenant, adapter and kind, and is its only one
I5  every projection is the fold of the log
I6  usage is the sum of the results' costs; a batch's charges sum to the time it was busy, a request's to its cost
I7  seqs of an adapter are 0, 1, 2, ... and are answered in that order
I9  an idempotency key stands for one request, and its hash is kept
I10 what was fenced carries the epoch that held then; epochs of a lease are 1, 2, 3, ...
I13 what a refused submit would have left behind: rows of no event (blobs' names, projections)
I14 every body and blob is there and has the bytes that were written
I15 every seal is the root over the heads as they were then, and so is the one that was kept elsewhere
I16 of an erased tenant nothing is left: no body, no blob, no key
"""

from collections.abc import Iterator
from typing import NoReturn

import msgspec
import sqlalchemy as sa
from sqlalchemy import RowMapping

from tinkerbell.errors import Corrupt
from tinkerbell.events import holdings, kinds, projections, storage
from tinkerbell.events import tables as t
from tinkerbell.events.blobs import BlobStore
from tinkerbell.events.chain import GENESIS, link
from tinkerbell.events.check_contents import Contents
from tinkerbell.events.check_requests import Requests
from tinkerbell.events.check_seals import KeptSeal, Seals
from tinkerbell.events.check_unreadable import Legibility, Unread
from tinkerbell.events.codec import read_event
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.reading import blobs_of
from tinkerbell.events.rules import record
from tinkerbell.events.vault import Vault

PAGE_EVENTS = 500


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was verified."""

    num_events: int
    num_streams: int
    num_requests: int
    num_results: int
    num_pending: int
    num_adapters: int
    num_seals: int
    num_removed: int
    """Events whose bodies and blobs were erased or compacted."""
    num_blobs: int
    blob_bytes: int
    num_orphans: int
    """Files in the blob store that no event needs; see events/storage.py."""
    orphan_bytes: int
    cost_us: int
    """Charged in all."""
    unreadable: list[Unread]
    """What is as it was written, and yet cannot be read by this release; what follows from it was not compared."""
    invariants: tuple[str, ...] = tuple(f"I{number}" for number in range(1, 17) if number not in (8, 12))
    """I8 and I12 are about what happens in time, which a log at rest does not show."""


def refuse(invariant: str, position: int | None, why: str) -> NoReturn:
    """Raise Corrupt that says which invariant does not hold, and where."""
    where = f" at position {position}" if position is not None else ""
    raise Corrupt(f"{invariant}{where}: {why}", invariant=invariant, position=position)


def check(connection: sa.Connection, blobs: BlobStore, vault: Vault, kept: KeptSeal | None = None) -> CheckReport:
    """Verify everything that this connection sees. Memory: the projections and one page of events."""
    heads: dict[str, tuple[int, bytes]] = {}
    requests, contents, seals = Requests(), Contents(blobs, connection), Seals(connection, kept)
    legibility = Legibility(vault)
    folded: projections.Tables = {}
    position = 0
    for row, named in _rows(connection):
        position += 1
        if row["position"] != position:
            refuse("I1", position, f"the next event has position {row['position']}")
        _check_chain(heads, row, named)
        seals.see(position, heads)
        body = contents.see(row, named)
        recorded = record(row, read_event(row["type"], row["schema_version"], row["data"]), named)
        cause = requests.see(row, recorded)
        legibility.see(recorded, cause)
        if body is not None:
            legibility.see_body(recorded, body)
        for change in projections.fold(recorded, cause):
            projections.apply(folded, change)
    head = connection.execute(sa.select(t.log_head.c.position)).scalar_one_or_none()
    if head != position:
        refuse("I1", None, f"log_head says {head}, the log ends at {position}")
    _check_heads(connection, heads)
    if legibility.costs_known:
        requests.end()
    contents.end(connection)
    seals.end()
    _check_projections(connection, folded, legibility)
    if legibility.costs_known:
        _check_usage(connection, requests.cost_us)
    _check_stored(connection)
    orphans = storage.survey(connection, blobs).orphans
    return CheckReport(
        num_events=position,
        num_streams=len(heads),
        num_requests=requests.num_requests,
        num_results=requests.num_results,
        num_pending=requests.num_requests - requests.num_results,
        num_adapters=len(folded.get("adapters", {})),
        num_seals=seals.num_seals,
        num_removed=contents.num_removed,
        num_blobs=contents.num_blobs,
        blob_bytes=contents.num_bytes,
        num_orphans=orphans.number,
        orphan_bytes=orphans.num_bytes,
        cost_us=requests.cost_us,
        unreadable=legibility.found,
    )


def rebuild(events: Iterator[Recorded]) -> projections.Tables:
    """The projections of a log from position 1, folded in memory."""
    tables: projections.Tables = {}
    causes: dict[int, projections.Cause] = {}
    for recorded in events:
        if kinds.is_request(recorded.event):
            causes[recorded.position] = projections.cause_of(recorded)
        cause = causes.get(recorded.causation) if recorded.causation is not None else None
        for change in projections.fold(recorded, cause):
            projections.apply(tables, change)
    return tables


def stored_projections(connection: sa.Connection) -> projections.Tables:
    """The projections as they are in the database, without what is no fold of the log (leases' expiry)."""
    return {
        name: {
            tuple(row[key] for key in projections.KEYS[name]): {
                column: value
                for column, value in row.items()
                if column not in projections.KEYS[name] and (name, column) != ("leases", "expires_us")
            }
            for row in connection.execute(sa.select(table)).mappings()
        }
        for name, table in t.PROJECTIONS.items()
    }


def _rows(connection: sa.Connection) -> Iterator[tuple[RowMapping, dict[str, bytes]]]:
    after = 0
    while True:
        query = sa.select(t.events).where(t.events.c.position > after).order_by(t.events.c.position)
        rows = connection.execute(query.limit(PAGE_EVENTS)).mappings().all()
        if not rows:
            return
        named = blobs_of(connection, rows)
        for row in rows:
            yield row, named.get(row["position"], {})
        after = rows[-1]["position"]


def _check_chain(heads: dict[str, tuple[int, bytes]], row: RowMapping, named: dict[str, bytes]) -> None:
    version, prev_hash = heads.get(row["stream"], (-1, GENESIS))
    if row["stream_version"] != version + 1:
        refuse("I2", row["position"], f"{row['stream']} goes from version {version} to {row['stream_version']}")
    if row["prev_hash"] != prev_hash:
        refuse("I3", row["position"], f"it does not continue {row['stream']}")
    if row["hash"] != _link(prev_hash, row, named):
        refuse("I3", row["position"], "its hash is not that of its columns")
    heads[row["stream"]] = (version + 1, row["hash"])


def _link(prev_hash: bytes, row: RowMapping, named: dict[str, bytes]) -> bytes | None:
    """The hash that the row must have; None for values that no event has."""
    try:
        return link(prev_hash, row, named)
    except (TypeError, OverflowError):
        return None


def _check_heads(connection: sa.Connection, heads: dict[str, tuple[int, bytes]]) -> None:
    stored = {row.stream: (row.version, row.head_hash) for row in connection.execute(sa.select(t.streams))}
    if stored != heads:
        wrong = sorted(name for name in stored.keys() | heads.keys() if stored.get(name) != heads.get(name))
        refuse("I2", None, f"the head of {', '.join(wrong[:3])} is not its last event")


def _check_projections(connection: sa.Connection, folded: projections.Tables, legibility: Legibility) -> None:
    for name, stored in stored_projections(connection).items():
        expected = folded.get(name, {})
        wrong = [
            key
            for key in (stored.keys() | expected.keys() if stored != expected else ())
            if stored.get(key) != expected.get(key) and legibility.is_known(name, key, stored.get(key))
        ]
        if wrong:
            first = min(wrong, key=repr)
            refuse("I5", None, f"{name} {first}: stored {stored.get(first)}, the log gives {expected.get(first)}")


def _check_stored(connection: sa.Connection) -> None:
    said = dict(connection.execute(sa.select(t.stored.c.tenant, t.stored.c.num_bytes)).all())
    counted = holdings.stored_now(connection)
    if said != counted:
        tenant = min(name for name in said.keys() | counted.keys() if said.get(name) != counted.get(name))
        refuse("I5", None, f"stored {tenant}: {said.get(tenant)} bytes, there are {counted.get(tenant)}")


def _check_usage(connection: sa.Connection, cost_us: int) -> None:
    total = connection.execute(sa.select(sa.cast(sa.func.coalesce(sa.func.sum(t.usage.c.cost_us), 0), t.Big)))
    billed = total.scalar_one()
    if billed != cost_us:
        refuse("I6", None, f"usage has {billed} us, the results cost {cost_us} us")
