"""Keys: a data key for each tenant, in the database, wrapped by the key in a file.

Who destroys the wrapped key of a tenant has made all its bodies and blobs unreadable at once, whoever holds copies of
them; hashes and chains are over the encrypted bytes and still verify.
"""

import logging
import secrets
import threading
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tinkerbell.errors import Erased, KeyUnavailable, Unavailable
from tinkerbell.events import envelope
from tinkerbell.events.commits import oldest
from tinkerbell.events.key_file import KeyFile, Keys
from tinkerbell.events.tables import data_keys
from tinkerbell.types import TenantId

log = logging.getLogger(__name__)

_NONCE_BYTES = 12


class Vault:
    """Encrypts and decrypts; any number of threads may use it. The key file is read when it is first needed, and made
    when the first data key is."""

    def __init__(self, reader: sa.Engine, key_file: Path, *, writer: sa.Engine | None = None) -> None:
        """Without `writer` it can only open. With it, what is stored from now on is encrypted."""
        self._reader = reader
        self._writer = writer
        self._file = KeyFile(key_file)
        self._lock = threading.Lock()
        self._keys: Keys | None = None
        self._by_id: dict[bytes, bytes] = {}
        self._by_tenant: dict[TenantId, tuple[bytes, bytes]] = {}
        """Tenant -> (id, key) to encrypt with."""
        self._committing: Keys | None = None
        """Of the log's commits, once they were compared with it."""

    def seal(self, tenant: TenantId, data: bytes) -> bytes:
        """`data` encrypted for the tenant, whose key is made if there is none. Raises KeyUnavailable."""
        found = self._by_tenant.get(tenant)
        if found is None:
            with self._lock:
                found = self._by_tenant[tenant] = self._living(tenant) or self._make(tenant)
        return envelope.seal(*found, data)

    def open(self, stored: bytes) -> bytes:
        """What was stored, decrypted if it is encrypted. Raises Erased, KeyUnavailable, Corrupt."""
        key = self.key_of(stored)
        return stored if key is None else envelope.unseal(stored, key)

    def key_of(self, stored: bytes) -> bytes | None:
        """The key of these stored bytes alone; None where they are not encrypted. Raises as `open` does."""
        if not envelope.is_envelope(stored):
            return None
        key_id = envelope.key_id_of(stored)
        data_key = self._by_id.get(key_id)
        if data_key is None:
            with self._lock:
                data_key = self._by_id[key_id] = self._read(key_id)
        return envelope.key_of(stored, data_key)

    @property
    def path(self) -> Path:
        """Of the key file."""
        return self._file.path

    def require(self) -> None:
        """Raise KeyUnavailable unless the key file can be used, where there is one, and wrapped keys of this database.
        A key that was damaged is its tenant's loss, and found when it is needed."""
        keys = self._load()
        with self._reader.connect() as connection:
            living = sa.select(data_keys).where(data_keys.c.wrapped.is_not(None))
            names = set(connection.execute(living.with_only_columns(data_keys.c.wrapped_by).distinct()).scalars())
            if names and (keys is None or keys.name not in names):
                self.unwrap(connection.execute(living.limit(1)).mappings().one())

    def forget(self, tenant: TenantId) -> None:
        """Its keys were destroyed: do not keep them in memory either."""
        with self._lock:
            self._by_tenant.pop(tenant, None)
            self._by_id.clear()

    def authenticate(self, data: bytes) -> bytes:
        """[32] HMAC-SHA256 under a key that follows from the one in the file. Raises KeyUnavailable."""
        return (self._load() or self._create()).authenticate(data)

    def keys(self) -> Keys | None:
        """What is in the key file; None where there is no file. Raises KeyUnavailable."""
        return self._load()

    def commit_keys(self, *, make: bool) -> Keys | None:
        """What the log's writer authenticates commits with; None where nothing here has a key, and (`make` false) none
        is to be made. Takes no lock: the writer must not wait for who waits for it. Raises KeyUnavailable for a file
        that is not this log's, or is missing though the log has been written with one."""
        if self._committing is None:
            keys, names = self._load(), self._names()
            with self._reader.connect() as connection:
                first = oldest(connection)
            if keys is None and not names and first is None:
                if not make:
                    return None
                keys = self._create()
            if keys is None or (names and keys.name not in names) or (first is not None and not first.is_of(keys)):
                raise self._not_ours()
            self._committing = keys
        return self._committing

    def rewrap(self) -> int:
        """Wrap every living data key anew with another wrapping key, which takes the place of the one in the key file;
        how many. What was wrapped before, wherever it is kept, opens with nothing any more. Raises KeyUnavailable."""
        assert self._writer is not None, "only what may write makes keys"
        with self._lock:
            keys = self._load()
            if keys is None:
                if not self._names():
                    return 0
                raise self._not_ours()
            with self._writer.begin() as connection:
                fresh, num_keys = self._file.stage(keys), 0
                for row in connection.execute(sa.select(data_keys)).mappings().all():
                    values: dict[str, Any] = {"wrapped_by": fresh.name}
                    if row["wrapped"] is not None:
                        try:
                            data_key = self.unwrap(row)
                        except KeyUnavailable as exc:
                            # Nobody could read it before, and nobody can afterwards.
                            log.warning("a data key was left as it is: %s", exc)
                            continue
                        values["wrapped"] = wrap(fresh, row["tenant"], row["id"], data_key)
                        num_keys += 1
                    connection.execute(data_keys.update().where(data_keys.c.id == row["id"]).values(**values))
            self._file.promote()
            self._keys = self._committing = None
        return num_keys

    # ---- data keys -------------------------------------------------------------------------------------------------

    def _living(self, tenant: TenantId) -> tuple[bytes, bytes] | None:
        c = data_keys.c
        query = sa.select(data_keys).where(c.tenant == tenant, c.wrapped.is_not(None)).order_by(c.id).limit(1)
        with self._reader.connect() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            return None
        data_key = self._by_id[row["id"]] = self.unwrap(row)
        return row["id"], data_key

    def _read(self, key_id: bytes) -> bytes:
        with self._reader.connect() as connection:
            row = connection.execute(sa.select(data_keys).where(data_keys.c.id == key_id)).mappings().first()
        if row is None:
            raise KeyUnavailable(f"there is no data key {key_id.hex()}: the table data_keys was not restored")
        if row["wrapped"] is None:
            raise Erased(f"tenant {row['tenant']} was erased: what it had stored cannot be read any more")
        return self.unwrap(row)

    def unwrap(self, row: sa.RowMapping) -> bytes:
        """The data key in a row of data_keys. Raises KeyUnavailable."""
        keys = self._load()
        if keys is None:
            raise KeyUnavailable(
                f"the key file {self._file.path} is missing, and bodies and blobs are encrypted with it: put it back,"
                " or say where it is with `key_file`"
            )
        wrapped, bound = row["wrapped"], _bound(row["tenant"], row["id"])
        try:
            return AESGCM(keys.wrapping).decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], bound)
        except (InvalidTag, ValueError, TypeError) as exc:
            raise KeyUnavailable(
                f"the data key of tenant {row['tenant']} was wrapped by another key than that in {self._file.path}"
                if row["wrapped_by"] != keys.name
                else f"the data key of tenant {row['tenant']} was changed in the table data_keys"
            ) from exc

    def _make(self, tenant: TenantId) -> tuple[bytes, bytes]:
        assert self._writer is not None, "only what may write makes keys"
        key_id, data_key = secrets.token_bytes(envelope.ID_BYTES), secrets.token_bytes(envelope.KEY_BYTES)
        names = self._names()
        # A new file would be one key more to lose; and where there are keys already, it was lost.
        keys = self._load() or (self._create() if not names else None)
        if keys is None or (names and keys.name not in names):
            raise self._not_ours()
        values = {"id": key_id, "tenant": tenant, "wrapped": wrap(keys, tenant, key_id, data_key)}
        try:
            with self._writer.begin() as connection:
                made_us = time.time_ns() // 1000
                connection.execute(data_keys.insert().values(**values, wrapped_by=keys.name, created_us=made_us))
        except sa.exc.SQLAlchemyError as exc:
            raise Unavailable("the database did not take a new data key") from exc
        self._by_id[key_id] = data_key
        return key_id, data_key

    def _not_ours(self) -> KeyUnavailable:
        return KeyUnavailable(
            f"the data keys in the database were not wrapped by {self._file.path}, or the log was not written with it:"
            " put the right key file back, or say where it is with `key_file`"
        )

    def _names(self) -> set[str]:
        """Of the wrapping keys that the data keys in the database need."""
        with self._reader.connect() as connection:
            return set(connection.execute(sa.select(data_keys.c.wrapped_by).distinct()).scalars())

    # ---- the key file ----------------------------------------------------------------------------------------------

    def _load(self) -> Keys | None:
        """What is in the file; None where there is no file. Raises KeyUnavailable for what is no key."""
        if self._keys is None:
            staged = self._file.load_next()
            if staged is not None and staged.name in self._names():
                # Whoever wrapped the data keys anew ended before the file was in its place.
                self._file.promote()
            self._keys = self._file.load()
        return self._keys

    def _create(self) -> Keys:
        self._keys = self._file.create()
        return self._keys


def wrap(keys: Keys, tenant: TenantId, key_id: bytes, data_key: bytes) -> bytes:
    """A data key as it is stored."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(keys.wrapping).encrypt(nonce, data_key, _bound(tenant, key_id))


def _bound(tenant: TenantId, key_id: bytes) -> bytes:
    """What a wrapped key is authenticated with: nobody can give one tenant another's."""
    return key_id + tenant.encode()
