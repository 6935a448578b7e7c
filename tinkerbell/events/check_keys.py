"""Whether what is encrypted can be read (I19): a key that is gone is noticed by nobody until somebody asks."""

from collections.abc import Iterator

import sqlalchemy as sa

from tinkerbell.errors import Corrupt, KeyUnavailable
from tinkerbell.events import envelope
from tinkerbell.events.blobs import BlobStore
from tinkerbell.events.removal import FILE, destroyed_keys
from tinkerbell.events.tables import blobs, data_keys, events
from tinkerbell.events.vault import Vault

_HEAD = len(envelope.MAGIC) + envelope.ID_BYTES


def check_keys(connection: sa.Connection, store: BlobStore, vault: Vault) -> int:
    """Unwrap every living data key; how many there are. Raises Corrupt for one that does not open, that was destroyed
    without an erasure, or that some body or blob needs and that is not there."""
    destroyed = destroyed_keys(connection)
    living: set[bytes] = set()
    wrong: list[str] = []
    for row in connection.execute(sa.select(data_keys).order_by(data_keys.c.tenant)).mappings():
        if row["wrapped"] is None:
            if row["id"] not in destroyed:
                wrong.append(f"the data key of tenant {row['tenant']} was destroyed, and the tenant was not erased")
            continue
        living.add(row["id"])
        try:
            vault.unwrap(row)
        except KeyUnavailable as exc:
            wrong.append(exc.detail)
    if not wrong:
        missing = {key for key in _needed(connection, store) if key not in living and key not in destroyed}
        wrong = [f"there is no data key {key.hex()}, and something is encrypted with it" for key in sorted(missing)]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise Corrupt(f"I19: {'; '.join(wrong[:3])}{more}", invariant="I19")
    return len(living)


def _needed(connection: sa.Connection, store: BlobStore) -> Iterator[bytes]:
    """Ids of the keys that stored bodies and blobs name, each at least once."""
    head = sa.func.substr(events.c.body, 1, _HEAD).label("head")
    for row in connection.execute(sa.select(head).where(events.c.body.is_not(None)).distinct()):
        if envelope.is_envelope(row.head):
            yield row.head[len(envelope.MAGIC) :]
    for digest in connection.execute(sa.select(blobs.c.hash).where(blobs.c.location == FILE)).scalars():
        start = store.head(digest.hex(), _HEAD)
        if envelope.is_envelope(start):
            yield start[len(envelope.MAGIC) :]
