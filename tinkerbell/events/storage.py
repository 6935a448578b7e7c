"""What the blob store has, against what the log names; and what of it belongs to whom."""

from collections import defaultdict

import msgspec
import sqlalchemy as sa

from tinkerbell.events import removal
from tinkerbell.events.blobs import BlobStore
from tinkerbell.events.tables import blobs, event_blobs, events


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """A number of blobs or files, and their bytes as stored."""

    number: int = 0
    num_bytes: int = 0

    def __add__(self, other: "Counted") -> "Counted":
        return Counted(number=self.number + other.number, num_bytes=self.num_bytes + other.num_bytes)


class StorageReport(msgspec.Struct, frozen=True, kw_only=True):
    """The blob store as it is."""

    needed: Counted
    """Blobs that an event names whose bulk is not gone."""
    there: Counted
    """Files, whole by their names."""
    orphans: Counted
    """Files that no event needs. Those of submits under way are among them; the rest goes with the next sweep."""
    halves: Counted
    """Files being written, or left by a writer that died in the middle."""
    missing: Counted
    """Blobs that are needed and are not there, or have another size."""
    missing_digests: list[str]
    """sha256 (hex) of the first of them."""
    tenants: dict[str, dict[str, Counted]]
    """Tenant -> saves, recovery_points or bodies -> blobs that its events need. A copy's are counted with it, too."""


SHOWN = 20
_RECOVERY = "checkpoint.written"


def survey(connection: sa.Connection, store: BlobStore) -> StorageReport:
    """Compare the directory with what this connection sees, a part at a time; no contents are read."""
    needed = there = orphans = halves = missing = Counted()
    missing_digests: list[str] = []
    for number in range(256):
        part = f"{number:02x}"
        named = removal.needed_of(connection, bytes([number]))
        files = {file.digest: file.num_bytes for file in store.files(part)}
        needed += _count(named)
        there += _count(files)
        orphans += _count({digest: size for digest, size in files.items() if digest not in named})
        halves += _count({str(path): found.st_size for path, found in store.halves(part)})
        gone = {digest: size for digest, size in named.items() if files.get(digest) != size}
        missing += _count(gone)
        missing_digests += sorted(gone)[: SHOWN - len(missing_digests)]
    return StorageReport(
        needed=needed,
        there=there,
        orphans=orphans,
        halves=halves,
        missing=missing,
        missing_digests=missing_digests,
        tenants=_by_tenant(connection),
    )


def _count(sizes: dict[str, int]) -> Counted:
    return Counted(number=len(sizes), num_bytes=sum(sizes.values()))


def _by_tenant(connection: sa.Connection) -> dict[str, dict[str, Counted]]:
    kind = sa.case(
        (event_blobs.c.name == "body", "bodies"), (events.c.type == _RECOVERY, "recovery_points"), else_="saves"
    )
    names = event_blobs.join(events, events.c.position == event_blobs.c.position)
    total = sa.cast(sa.func.sum(blobs.c.length), sa.BigInteger)
    query = (
        sa.select(events.c.tenant, kind.label("kind"), sa.func.count(), total)
        .select_from(names.join(blobs, blobs.c.hash == event_blobs.c.blob_hash))
        .where(removal.STILL_THERE)
        .group_by(events.c.tenant, kind)
    )
    found: dict[str, dict[str, Counted]] = defaultdict(dict)
    for tenant, what, number, num_bytes in connection.execute(query):
        found[tenant][what] = Counted(number=number, num_bytes=num_bytes)
    return dict(sorted(found.items()))
