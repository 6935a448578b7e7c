"""Where a replay reads: a server's database, never written to, or an exported run. Both give rows as stored."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa

from tinkerbell.config import Settings
from tinkerbell.errors import Corrupt, NotFound, SchemaOutdated
from tinkerbell.events import codec, envelope, schema
from tinkerbell.events import tables as t
from tinkerbell.events.blobs import BlobStore
from tinkerbell.events.engine import make_engine
from tinkerbell.events.kinds import Body, Recorded, type_of
from tinkerbell.events.reading import blobs_of, in_parts
from tinkerbell.events.removal import why_blob_gone, why_gone
from tinkerbell.events.rules import record
from tinkerbell.events.vault import Vault

PAGE_ROWS = 1000
COLUMNS = tuple(column for column in t.events.c if column.name != "body")
"""Bodies are read one at a time: a run's may be more than fits in memory."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An event with the columns its hash is over."""

    columns: Mapping[str, Any]
    """Of the row, without the body."""
    blobs: Mapping[str, bytes]
    """Name -> hash."""
    recorded: Recorded
    """Its `body` is always None; ask the log."""

    @property
    def position(self) -> int:
        return self.recorded.position


def entry(columns: Mapping[str, Any], blobs: Mapping[str, bytes]) -> Entry:
    """The event of a row, `Unreadable` where this release cannot read it."""
    event = codec.read_event(columns["type"], columns["schema_version"], columns["data"])
    return Entry(columns, blobs, record({**columns, "body": None}, event, dict(blobs)))


class Log(Protocol):
    """What a replay needs of a log. Nothing here can change it."""

    name: str
    """For a person: where it is."""
    foreign: bool
    """Whether anybody may have written it, and not this server."""

    def entries(
        self,
        after: int = 0,
        *,
        until: int | None = None,
        tenant: str | None = None,
        adapter: str | None = None,
        types: Collection[str] | None = None,
    ) -> Iterator[Entry]:
        """Events with a position in (after, until], by position."""
        ...

    def named(self, name: str) -> list[str]:
        """Ids of the adapters that were given this name."""
        ...

    def checkpoint(self, tenant: str, checkpoint: str) -> Entry | None:
        """The save.completed, checkpoint.written or checkpoint.copied that made a tenant's checkpoint."""
        ...

    def stored_body(self, at: Entry) -> bytes:
        """The body's bytes as stored, unverified; only of an event that has one. Raises Corrupt without them."""
        ...

    def stored_blob(self, digest: str) -> bytes:
        """The bytes with this sha256 (hex), as stored. Raises Corrupt when they are missing or changed."""
        ...

    def key_of(self, stored: bytes) -> bytes | None:
        """The key of a stored body or blob; None where it is not encrypted. Raises Erased, KeyUnavailable."""
        ...

    def removed(self, positions: Collection[int]) -> set[int]:
        """Those of these events whose bodies and blobs were taken out because they were old or superseded."""
        ...

    def close(self) -> None: ...


def body_of(log: Log, at: Entry) -> Body | None:
    """The event's body, verified against its hash; None where its type has none. Raises Corrupt."""
    recorded = at.recorded
    if recorded.body_codec is None:
        return None
    stored = log.stored_body(at)
    found = hashlib.sha256(stored).hexdigest()
    if found != recorded.body_hash:
        raise Corrupt(
            f"the body of event {at.position} has other bytes than were written",
            recorded=recorded.body_hash,
            found=found,
        )
    return codec.decode_body(type_of(recorded.event), recorded.body_codec, opened(log, stored))


def blob_of(log: Log, digest: str) -> bytes:
    """What the blob with this hash (hex) holds. Raises Corrupt, Erased, KeyUnavailable."""
    return opened(log, log.stored_blob(digest))


def opened(log: Log, stored: bytes) -> bytes:
    """A stored body or blob, decrypted if it is encrypted. Raises Corrupt, Erased, KeyUnavailable."""
    key = log.key_of(stored)
    return stored if key is None else envelope.unseal(stored, key)


class DatabaseLog:
    """A server's log, read beside the server: no lease, no writer, no lock that outlives a statement."""

    foreign = False

    def __init__(self, engine: sa.Engine, blobs: BlobStore, vault: Vault, name: str) -> None:
        self.name = name
        self._engine = engine
        self._blobs = blobs
        self._vault = vault
        with engine.connect() as connection:
            self.head = int(connection.execute(sa.select(t.log_head.c.position)).scalar_one())
        """What is written later is not seen, so that every question has the same log."""

    @classmethod
    def open(cls, settings: Settings) -> "DatabaseLog":
        """The log of these settings as it is now. Raises NotFound where there is none, SchemaOutdated, Unavailable."""
        engine = make_engine(settings.url, role="reader")
        shown = engine.url.render_as_string(hide_password=True)
        if schema.is_empty(settings.url):
            raise NotFound(f"no log in {shown}")
        if not schema.is_current(settings.url):
            raise SchemaOutdated(f"{shown}: after a backup, run `tinkerbell db upgrade` with the same settings")
        return cls(engine, BlobStore(settings.blob_dir), Vault(engine, settings.key_path), shown)

    def entries(
        self,
        after: int = 0,
        *,
        until: int | None = None,
        tenant: str | None = None,
        adapter: str | None = None,
        types: Collection[str] | None = None,
    ) -> Iterator[Entry]:
        """See Log."""
        end = self.head if until is None else min(until, self.head)
        query = sa.select(*COLUMNS).where(t.events.c.position <= end).order_by(t.events.c.position).limit(PAGE_ROWS)
        if tenant is not None:
            query = query.where(t.events.c.tenant == tenant)
        if adapter is not None:
            query = query.where(t.events.c.adapter == adapter)
        if types is not None:
            query = query.where(t.events.c.type.in_(sorted(types)))
        while found := self._read(query.where(t.events.c.position > after)):
            yield from found
            after = found[-1].position

    def at(self, positions: Collection[int]) -> list[Entry]:
        """The events at these positions, by position."""
        return [
            each
            for part in in_parts(sorted(positions))
            for each in self._read(
                sa.select(*COLUMNS).where(t.events.c.position.in_(part)).order_by(t.events.c.position)
            )
        ]

    def named(self, name: str) -> list[str]:
        """See Log."""
        c = t.adapters.c
        with self._engine.connect() as connection:
            found = connection.execute(sa.select(c.id).where(c.name == name).order_by(c.created_us, c.id))
            return [str(id_) for id_ in found.scalars()]

    def checkpoint(self, tenant: str, checkpoint: str) -> Entry | None:
        """See Log."""
        c = t.checkpoints.c
        query = sa.select(c.position).where(c.id == checkpoint, c.tenant == tenant, c.position <= self.head)
        with self._engine.connect() as connection:
            position = connection.execute(query).scalar_one_or_none()
        return None if position is None else self.at([position])[0]

    def stored_body(self, at: Entry) -> bytes:
        """See Log."""
        if "body" in at.blobs:
            return self.stored_blob(at.blobs["body"].hex())
        with self._engine.connect() as connection:
            query = sa.select(t.events.c.body).where(t.events.c.position == at.position)
            stored = connection.execute(query).scalar_one()
            if stored is None:
                raise why_gone(connection, at.position) or Corrupt(f"event {at.position} has lost its body")
        return bytes(stored)

    def stored_blob(self, digest: str) -> bytes:
        """See Log."""
        try:
            return self._blobs.get(digest)
        except Corrupt as exc:
            with self._engine.connect() as connection:
                raise why_blob_gone(connection, digest) or exc from exc

    def key_of(self, stored: bytes) -> bytes | None:
        """See Log."""
        return self._vault.key_of(stored)

    def removed(self, positions: Collection[int]) -> set[int]:
        """See Log."""
        c = t.removed_bulk.c
        found: set[int] = set()
        with self._engine.connect() as connection:
            for part in in_parts(sorted(positions)):
                found.update(connection.execute(sa.select(c.position).where(c.position.in_(part))).scalars())
        return found

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def _read(self, query: "sa.Select[Any]") -> list[Entry]:
        with self._engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
            named = blobs_of(connection, rows)
        # Names of columns are a subclass of str, which is none of anybody's business here.
        return [
            entry({str(name): value for name, value in row.items()}, named.get(row["position"], {})) for row in rows
        ]
