"""Keys: a data key for each tenant, in the database, wrapped by the key in a file.

Who destroys the wrapped key of a tenant has made all its bodies and blobs unreadable at once, whoever holds copies of
them; hashes and chains are over the encrypted bytes and still verify.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
import threading
import time
from pathlib import Path

import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tinkerbell.errors import Erased, KeyUnavailable, Unavailable
from tinkerbell.events import envelope
from tinkerbell.events.tables import data_keys
from tinkerbell.types import TenantId

_NONCE_BYTES = 12


class Vault:
    """Encrypts and decrypts; any number of threads may use it. The key file is read when it is first needed, and made
    when the first data key is."""

    def __init__(self, reader: sa.Engine, key_file: Path, *, writer: sa.Engine | None = None) -> None:
        """Without `writer` it can only open. With it, what is stored from now on is encrypted."""
        self._reader = reader
        self._writer = writer
        self._key_file = key_file
        self._lock = threading.Lock()
        self._kek: bytes | None = None
        self._by_id: dict[bytes, bytes] = {}
        self._by_tenant: dict[TenantId, tuple[bytes, bytes]] = {}
        """Tenant -> (id, key) to encrypt with."""

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

    def require(self) -> None:
        """Raise KeyUnavailable unless the key file is one that wrapped keys of this database. A key that was damaged is
        its tenant's loss, and found when it is needed."""
        with self._reader.connect() as connection:
            living = sa.select(data_keys).where(data_keys.c.wrapped.is_not(None))
            names = set(connection.execute(living.with_only_columns(data_keys.c.wrapped_by).distinct()).scalars())
            kek = self._load()
            if names and (kek is None or _name(kek) not in names):
                self._unwrap(connection.execute(living.limit(1)).mappings().one())

    def forget(self, tenant: TenantId) -> None:
        """Its keys were destroyed: do not keep them in memory either."""
        with self._lock:
            self._by_tenant.pop(tenant, None)
            self._by_id.clear()

    def authenticate(self, data: bytes) -> bytes:
        """[32] HMAC-SHA256 under a key that follows from the one in the file. Raises KeyUnavailable."""
        with self._lock:
            kek = self._load() or self._create()
        return hmac.digest(hmac.digest(kek, b"tinkerbell authentication", "sha256"), data, "sha256")

    # ---- data keys -------------------------------------------------------------------------------------------------

    def _living(self, tenant: TenantId) -> tuple[bytes, bytes] | None:
        c = data_keys.c
        query = sa.select(data_keys).where(c.tenant == tenant, c.wrapped.is_not(None)).order_by(c.id).limit(1)
        with self._reader.connect() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            return None
        data_key = self._by_id[row["id"]] = self._unwrap(row)
        return row["id"], data_key

    def _read(self, key_id: bytes) -> bytes:
        with self._reader.connect() as connection:
            row = connection.execute(sa.select(data_keys).where(data_keys.c.id == key_id)).mappings().first()
        if row is None:
            raise KeyUnavailable(f"there is no data key {key_id.hex()}: the table data_keys was not restored")
        if row["wrapped"] is None:
            raise Erased(f"tenant {row['tenant']} was erased: what it had stored cannot be read any more")
        return self._unwrap(row)

    def _unwrap(self, row: sa.RowMapping) -> bytes:
        kek = self._load()
        if kek is None:
            raise KeyUnavailable(
                f"the key file {self._key_file} is missing, and bodies and blobs are encrypted with it: put it back, or"
                " say where it is with `key_file`"
            )
        wrapped = row["wrapped"]
        try:
            return AESGCM(kek).decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], _bound(row["tenant"], row["id"]))
        except (InvalidTag, ValueError, TypeError) as exc:
            raise KeyUnavailable(
                f"the data key of tenant {row['tenant']} was wrapped by another key than that in {self._key_file}"
                if row["wrapped_by"] != _name(kek)
                else f"the data key of tenant {row['tenant']} was changed in the table data_keys"
            ) from exc

    def _make(self, tenant: TenantId) -> tuple[bytes, bytes]:
        assert self._writer is not None, "only what may write makes keys"
        key_id, data_key = secrets.token_bytes(envelope.ID_BYTES), secrets.token_bytes(envelope.KEY_BYTES)
        with self._reader.connect() as connection:
            names = set(connection.execute(sa.select(data_keys.c.wrapped_by).distinct()).scalars())
        # A new file would be one key more to lose; and where there are keys already, it was lost.
        kek = self._load() or (self._create() if not names else None)
        if kek is None or (names and _name(kek) not in names):
            raise KeyUnavailable(
                f"the data keys in the database were not wrapped by {self._key_file}: put the right key file back, or"
                " say where it is with `key_file`"
            )
        nonce = secrets.token_bytes(_NONCE_BYTES)
        wrapped = nonce + AESGCM(kek).encrypt(nonce, data_key, _bound(tenant, key_id))
        values = {"id": key_id, "tenant": tenant, "wrapped": wrapped, "wrapped_by": _name(kek)}
        try:
            with self._writer.begin() as connection:
                connection.execute(data_keys.insert().values(**values, created_us=time.time_ns() // 1000))
        except sa.exc.SQLAlchemyError as exc:
            raise Unavailable("the database did not take a new data key") from exc
        self._by_id[key_id] = data_key
        return key_id, data_key

    # ---- the key file ----------------------------------------------------------------------------------------------

    def _load(self) -> bytes | None:
        """The key in the file; None where there is no file. Raises KeyUnavailable for what is no key."""
        if self._kek is None:
            try:
                text = self._key_file.read_text().strip()
            except FileNotFoundError:
                return None
            except (PermissionError, IsADirectoryError, UnicodeDecodeError) as exc:
                raise KeyUnavailable(f"the key file {self._key_file} cannot be read: {exc}") from exc
            except OSError as exc:
                raise Unavailable(f"the key file {self._key_file} cannot be read now: {exc}") from exc
            try:
                kek = bytes.fromhex(text)
            except ValueError:
                kek = b""
            if len(kek) != envelope.KEY_BYTES:
                raise KeyUnavailable(
                    f"the key file {self._key_file} must have 64 hex digits, as `openssl rand -hex 32`"
                )
            self._kek = kek
        return self._kek

    def _create(self) -> bytes:
        """Make the file, readable by its owner only; durable on return, and never half of it."""
        directory = self._key_file.parent
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="tmp-key-", dir=directory)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(envelope.KEY_BYTES) + "\n")
                file.flush()
                os.fsync(file.fileno())
            # Where another process was first, its key is the one.
            with contextlib.suppress(FileExistsError):
                self._key_file.hardlink_to(temporary)
        finally:
            temporary.unlink()
        held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(held)
        finally:
            os.close(held)
        kek = self._load()
        assert kek is not None
        return kek


def _bound(tenant: TenantId, key_id: bytes) -> bytes:
    """What a wrapped key is authenticated with: nobody can give one tenant another's."""
    return key_id + tenant.encode()


def _name(kek: bytes) -> str:
    """Tells key files apart without saying anything of the key."""
    return hashlib.sha256(b"tinkerbell key file" + kek).hexdigest()[:16]
