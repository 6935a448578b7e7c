"""Bodies and blobs are encrypted with a key of their tenant. On SQLite and Postgres."""

import os
import stat
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from tests.support import log
from tests.support.life import live
from tests.support.owner import as_owner
from tinkerbell.config import Settings
from tinkerbell.errors import Corrupt, Erased, KeyUnavailable
from tinkerbell.events import envelope
from tinkerbell.events import tables as t
from tinkerbell.events.engine import make_engine
from tinkerbell.events.kinds import ForwardBackwardBody
from tinkerbell.events.store import EventStore
from tinkerbell.files import write_private

PATTERN = log.ints(*range(7001, 7033))
"""Tokens that nothing else has."""


def secret_request(adapter: str = "ad_one", tenant: str = "alice", times: int = 1) -> log.NewEvent:
    """A forward_backward with the pattern in it; many times: too large to be inline."""
    noise = os.urandom(len(PATTERN) * (times - 1))
    data = [log.Datum(PATTERN + noise, PATTERN + noise, {})]
    return log.forward_backward(adapter, tenant, data=data)


def stored_bytes(settings: Settings) -> bytes:
    """All that is stored of bodies and blobs, one after another."""
    engine = make_engine(settings.url, role="reader")
    with engine.connect() as connection:
        bodies = connection.execute(sa.select(t.events.c.body).where(t.events.c.body.is_not(None))).scalars().all()
    engine.dispose()
    return b"".join([*bodies, *(path.read_bytes() for path in settings.blob_dir.rglob("*") if path.is_file())])


@given(st.binary(max_size=200))
def test_an_envelope_opens_with_its_own_key_only(data: bytes) -> None:
    key_id, key = b"i" * 16, b"k" * 32
    sealed, again = envelope.seal(key_id, key, data), envelope.seal(key_id, key, data)
    assert envelope.is_envelope(sealed) and envelope.key_id_of(sealed) == key_id
    assert len(sealed) == len(data) + envelope.OVERHEAD and sealed != again
    assert envelope.unseal(sealed, envelope.key_of(sealed, key)) == data
    with pytest.raises(Corrupt):
        envelope.unseal(again, envelope.key_of(sealed, key))


def test_every_byte_of_an_envelope_counts() -> None:
    key = b"k" * 32
    sealed = envelope.seal(b"i" * 16, key, b"tokens")
    for at in range(len(envelope.MAGIC), len(sealed)):
        changed = sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]
        with pytest.raises(Corrupt):
            envelope.unseal(changed, envelope.key_of(changed, key))
    with pytest.raises(Corrupt, match="missing"):
        envelope.key_id_of(sealed[:20])


def test_nothing_readable_is_stored_and_all_can_be_read(store: EventStore, database_settings: Settings) -> None:
    store.append(log.add_lora())
    small, large = store.append(secret_request(), secret_request(times=2000))
    assert small.body is not None and small.body_codec == "zstd+aes256gcm" and "body" in large.blobs
    made, wanted = store.append(log.optim_step(), log.save())
    store.append(log.add_lora_completed(store.read()[0]), log.forward_backward_completed(small))
    store.append(log.forward_backward_completed(large), log.optim_step_completed(made, 1))
    (saved,) = store.append(log.save_completed(wanted, weights=PATTERN))
    assert PATTERN not in stored_bytes(database_settings)
    for recorded in (small, large):
        body = store.body(recorded)
        assert isinstance(body, ForwardBackwardBody) and body.data[0].tokens.startswith(PATTERN)
    assert store.blob(saved.blobs["weights"]) == PATTERN
    assert store.check().num_blobs == 4
    mode = stat.S_IMODE(database_settings.key_path.stat().st_mode)
    assert mode == 0o600, "nobody else may read the key"


def test_tenants_have_keys_of_their_own_and_equal_data_is_stored_twice(
    store: EventStore, database_settings: Settings
) -> None:
    store.append(log.add_lora(), log.add_lora("ad_bob", "bob"))
    one, other = store.append(secret_request(times=1), secret_request("ad_bob", "bob"))
    assert one.body_hash != other.body_hash, "who stores something learns nothing of who has stored it before"
    engine = make_engine(database_settings.url, role="reader")
    with engine.connect() as connection:
        assert sorted(connection.execute(sa.select(t.data_keys.c.tenant)).scalars()) == ["alice", "bob"]
    engine.dispose()


def test_an_old_log_stays_readable_and_is_encrypted_from_then_on(database_settings: Settings) -> None:
    off = msgspec.structs.replace(database_settings, encryption="off")
    with closing(EventStore.open(off)) as store:
        old = live(store)
        assert not off.key_path.exists() and {e.body_codec for e in old} <= {None, "zstd", "msgpack"}
    with closing(EventStore.open(database_settings)) as store:
        (new,) = store.append(secret_request())
        for recorded in (*old, new):
            assert (store.body(recorded) is None) == (recorded.body_codec is None)
        assert store.check().num_events == len(old) + 1


def test_without_the_key_file_the_log_verifies_and_bodies_say_what_to_do(
    store: EventStore, database_settings: Settings, tmp_path: Path
) -> None:
    store.append(log.add_lora())
    (asked,) = store.append(secret_request())
    kept = database_settings.key_path.read_text()
    for text in (None, "nonsense", "00" * 32):
        database_settings.key_path.unlink(missing_ok=True)
        if text is not None:
            write_private(database_settings.key_path, text)
        with closing(EventStore.open(database_settings)) as blind:
            blind.check()
            with pytest.raises(KeyUnavailable, match=r"encryption\.key"):
                blind.body(asked)
            with pytest.raises(KeyUnavailable, match=r"encryption\.key"):
                blind.append(log.sample(None, "carol"))
            assert database_settings.key_path.exists() == (text is not None), "no second key is made"
    moved = tmp_path / "elsewhere"
    moved.write_text(kept)
    with closing(EventStore.open(msgspec.structs.replace(database_settings, key_file=str(moved)))) as elsewhere:
        moved.chmod(0o640)
        with pytest.raises(KeyUnavailable, match=f"chmod 600 {moved}"):
            elsewhere.require_keys()
        with pytest.raises(KeyUnavailable, match=f"chmod 600 {moved}"):
            elsewhere.body(asked)
    moved.chmod(0o600)
    with closing(EventStore.open(msgspec.structs.replace(database_settings, key_file=str(moved)))) as elsewhere:
        assert elsewhere.body(asked) is not None


def test_a_destroyed_key_is_an_erasure(store: EventStore, database_settings: Settings) -> None:
    store.append(log.add_lora())
    (asked,) = store.append(secret_request())
    with as_owner(database_settings) as connection:
        connection.execute(t.data_keys.update().values(wrapped=None))
    with closing(EventStore.open(database_settings)) as later:
        with pytest.raises(Erased, match="alice was erased"):
            later.body(asked)
        (fresh,) = later.append(secret_request())
        assert later.body(fresh) is not None, "the name can be used again, with another key"


def test_a_tenants_key_is_nobody_elses(store: EventStore, database_settings: Settings) -> None:
    store.append(log.add_lora())
    (asked,) = store.append(secret_request())
    with as_owner(database_settings) as connection:
        connection.execute(t.data_keys.update().values(tenant="mallory"))
    with closing(EventStore.open(database_settings)) as later, pytest.raises(KeyUnavailable, match="changed"):
        later.body(asked)


def test_two_processes_make_one_key_file(database_settings: Settings) -> None:
    with closing(EventStore.open(database_settings)) as one, closing(EventStore.open(database_settings)) as other:
        (first,) = one.append(log.sample(None, "alice"))
        (second,) = other.append(log.sample(None, "alice"))
        assert one.body(second) == other.body(first) == one.body(first)
