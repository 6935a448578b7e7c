"""All that can be verified of a stored log: the log itself (I1 to I16, check.py), and what is around it.

I17 the schema is what the migrations give in an empty database
I18 every event from the first authenticated one on was written by who has the key file
I19 every data key that something stored needs is there and opens
"""

import msgspec
import sqlalchemy as sa

from tinkerbell.events.blobs import BlobStore
from tinkerbell.events.check import CheckReport, check
from tinkerbell.events.check_keys import check_keys
from tinkerbell.events.check_schema import check_schema
from tinkerbell.events.check_seals import KeptSeal
from tinkerbell.events.commits import check_commits
from tinkerbell.events.engine import snapshot
from tinkerbell.events.vault import Vault


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """What was verified."""

    log: CheckReport
    num_schema_parts: int
    """Columns, constraints, indexes, triggers and views that are as the migrations make them."""
    num_keys: int | None
    """Data keys that open with the key file; None: that was not asked for."""
    authenticated_from: int | None
    """Position from which on every event was written by who has the key file; None: not asked for, or none is, as in
    the log of an older release or of a server without a key file."""


def audit(
    writer: sa.Engine, reader: sa.Engine, blobs: BlobStore, vault: Vault, *, kept: KeptSeal | None, with_keys: bool
) -> Audit:
    """Verify everything. Without `with_keys` what needs the key file is left out.

    Raises Corrupt naming the invariant, and KeyUnavailable where the key file is needed and missing.
    """
    num_keys = authenticated_from = None
    with snapshot(reader) as connection:
        report = check(connection, blobs, vault, kept)
        if with_keys:
            authenticated_from = check_commits(connection, vault.keys())
            num_keys = check_keys(connection, blobs, vault)
    return Audit(
        log=report,
        # SQLite's writer would take the write lock to look.
        num_schema_parts=check_schema(reader if reader.dialect.name == "sqlite" else writer),
        num_keys=num_keys,
        authenticated_from=authenticated_from,
    )
