"""After an erasure no copy of a key or a body that the database keeps opens anything. On SQLite and Postgres."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.contract.test_event_erasure import erase
from tests.support import log
from tests.support.owner import as_owner
from tinkerbell.cli.bench.postgres import ScratchPostgres
from tinkerbell.config import Settings
from tinkerbell.errors import KeyUnavailable
from tinkerbell.events import tables as t
from tinkerbell.events.key_file import KeyFile
from tinkerbell.events.store import EventStore

MARKER = bytes(range(97, 123)) * 8
"""Of a body that nobody encrypted; in four bytes each it is a prompt."""


@pytest.fixture
def files(request: pytest.FixtureRequest, database_settings: Settings) -> list[Path]:
    """Directories that have all the database keeps of this log."""
    if not database_settings.url.startswith("postgresql"):
        return [Path(database_settings.data_dir)]
    server: ScratchPostgres = request.getfixturevalue("postgres")
    with as_owner(database_settings) as connection:
        oid = connection.exec_driver_sql("SELECT oid FROM pg_database WHERE datname = current_database()").scalar_one()
    data = server.directory / "data"
    return [data / "base" / str(oid), data / "pg_wal"]


def where(files: list[Path], needle: bytes) -> list[str]:
    return [str(path) for each in files for path in each.rglob("*") if path.is_file() and needle in path.read_bytes()]


def stored(settings: Settings) -> tuple[bytes, bytes]:
    """Of alice: (wrapped data key, body as it is in its row)."""
    with as_owner(settings) as connection:
        keys = sa.select(t.data_keys.c.wrapped).where(t.data_keys.c.tenant == "alice")
        bodies = sa.select(t.events.c.body).where(t.events.c.tenant == "alice", t.events.c.body.is_not(None))
        wrapped = connection.execute(keys).scalar_one()
        body = connection.execute(bodies.order_by(t.events.c.position.desc())).scalars().first()
    assert body is not None
    return wrapped, body


def test_nothing_that_was_erased_is_in_any_file_of_the_database(database_settings: Settings, files: list[Path]) -> None:
    with closing(EventStore.open(database_settings)) as store:
        store.append(log.add_lora(), log.add_lora("ad_bob", "bob"))
        asked = store.append(log.sample(), log.sample("ad_bob", "bob"))
        store.append(*(log.sample_completed(each) for each in asked))
    with closing(EventStore.open(msgspec.structs.replace(database_settings, encryption="off"))) as plain:
        (more,) = plain.append(log.sample())
        plain.append(log.sample_completed(more), log.add_lora_completed(plain.read()[0]))
    wrapped, body = stored(database_settings)
    assert where(files, wrapped) and where(files, body[:40])
    kept = Path(database_settings.data_dir) / "kept"
    shutil.copy(database_settings.key_path, kept)
    with closing(EventStore.open(database_settings)) as store:
        done = erase(store)
        assert (done.left, done.num_keys_rewrapped) == ((), 1)
        assert done.key_file == str(database_settings.key_path)
    assert where(files, wrapped) == [] and where(files, body[:40]) == []
    # A copy of the wrapped key that is kept elsewhere is worthless without the old key file.
    with pytest.raises(InvalidTag):
        keys = KeyFile(database_settings.key_path).load()
        assert keys is not None
        AESGCM(keys.wrapping).decrypt(wrapped[:12], wrapped[12:], b"")
    with closing(EventStore.open(database_settings)) as store:
        assert store.body(asked[1]) is not None, "bob's data is read with the new key file"
        store.append(log.sample("ad_bob", "bob"))
        assert store.audit().authenticated_from == 1, "and the log is authenticated as it was"
    older = msgspec.structs.replace(database_settings, key_file=str(kept))
    with closing(EventStore.open(older)) as old, pytest.raises(KeyUnavailable, match="wrapped by another key"):
        old.require_keys()


@pytest.fixture
def store(database_settings: Settings) -> Iterator[EventStore]:
    with closing(EventStore.open(database_settings)) as opened:
        opened.append(log.add_lora(), log.add_lora("ad_bob", "bob"))
        asked = opened.append(log.sample(), log.sample("ad_bob", "bob"))
        opened.append(*(log.sample_completed(each) for each in asked))
        opened.append(log.add_lora_completed(opened.read()[0]))
        yield opened


def test_a_key_file_that_cannot_be_replaced_is_said(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(KeyFile, "stage", refuse)
    done = erase(store)
    assert done.num_keys_rewrapped is None and "read-only file system" in done.left[0]
    assert done.num_keys_destroyed == 1 and store.audit().num_keys == 1
    monkeypatch.undo()
    again = erase(store)
    assert (again.position, again.num_keys_rewrapped, again.left) == (None, 1, ()), "it is done when it is run again"


@pytest.mark.parametrize("how", ["staged", "wrapped"])
def test_whoever_ends_while_keys_are_wrapped_anew_loses_none(
    store: EventStore, database_settings: Settings, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def end(*_: object) -> None:
        raise SystemExit(9)

    if how == "staged":
        monkeypatch.setattr("tinkerbell.events.vault.wrap", end)
    else:
        monkeypatch.setattr(KeyFile, "promote", end)
    with pytest.raises(SystemExit):
        erase(store)
    monkeypatch.undo()
    with closing(EventStore.open(database_settings)) as later:
        later.require_keys()
        bob = next(each for each in later.read(tenant="bob") if each.body_codec is not None)
        assert later.body(bob) is not None
        later.append(log.sample("ad_bob", "bob"))
        assert later.audit().authenticated_from == 1
        assert erase(later).num_keys_rewrapped == 1
        assert later.body(bob) is not None
