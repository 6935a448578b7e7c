"""Seals: what was sealed cannot be written anew unnoticed. On SQLite and Postgres."""

import hashlib

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from tests.support import log
from tests.support.life import live
from tests.support.owner import as_owner, forge
from tests.support.runs import serving
from tests.support.waiting import eventually
from tinkerbell.config import Settings
from tinkerbell.errors import Corrupt
from tinkerbell.events import kinds, seals
from tinkerbell.events import tables as t
from tinkerbell.events.check_seals import KeptSeal
from tinkerbell.events.store import EventStore


def rfc6962(entries: list[bytes]) -> bytes:
    """The definition, word for word."""
    if not entries:
        return hashlib.sha256(b"").digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\0" + entries[0]).digest()
    k = 1
    while 2 * k < len(entries):
        k *= 2
    return hashlib.sha256(b"\1" + rfc6962(entries[:k]) + rfc6962(entries[k:])).digest()


@given(st.lists(st.binary(max_size=8), max_size=40))
def test_the_root_is_that_of_the_rfc(entries: list[bytes]) -> None:
    assert seals.merkle_root(entries) == rfc6962(entries)


def test_a_root_stands_for_every_head() -> None:
    heads = {"adapter/a": (3, b"\1" * 32), "adapter/b": (0, b"\2" * 32), "tenant/c": (1, b"\3" * 32)}
    root = seals.root_of(heads)
    assert root == seals.root_of(dict(reversed(heads.items()))), "the order in which they are read does not matter"
    others = [{**heads, "tenant/c": (2, b"\3" * 32)}, {**heads, "tenant/c": (1, b"\4" * 32)}, {**heads, "x": (0, b"")}]
    others += [{name: head for name, head in heads.items() if name != left} for left in heads]
    assert len({root, *map(seals.root_of, others)}) == 1 + len(others)


def test_a_log_is_sealed_when_something_happened(store: EventStore) -> None:
    assert store.seal() is None and store.newest_seal() is None and store.last_sealed_us() is None
    live(store)
    sealed = store.seal()
    assert sealed is not None and sealed.position == store.head() - 1
    assert store.seal() is None and store.newest_seal() == sealed, "nothing but the seal has happened"
    store.append(log.add_lora("ad_more"))
    again = store.seal()
    assert again == store.newest_seal() != sealed
    assert store.check().num_seals == 2
    assert store.check(seal=KeptSeal(sealed.root)).num_seals == 2
    assert store.check(seal=KeptSeal(sealed.root, sealed.position)).num_seals == 2


def test_a_stream_written_anew_does_not_match_its_seal(store: EventStore, database_settings: Settings) -> None:
    events = live(store)
    sealed = store.seal()
    assert sealed is not None
    position = next(e.position for e in events if isinstance(e.event, kinds.OptimStepRequested))
    data = msgspec.json.encode(
        msgspec.structs.replace(events[position - 1].event, adam=log.AdamParams(learning_rate=0.002))
    )
    forge(database_settings, position, data=data.decode())
    heads(database_settings)
    with pytest.raises(Corrupt, match=f"I15 at position {sealed.position}") as refused:
        store.check()
    assert f"seal at {sealed.position + 1}" in refused.value.detail
    # Who can do that can write the seal anew, too: then only the one that was kept elsewhere shows it.
    with as_owner(database_settings) as connection:
        rows = connection.execute(sa.select(t.events).where(t.events.c.position <= sealed.position)).mappings()
        ends = {row["stream"]: (row["stream_version"], row["hash"]) for row in rows}
    forged = msgspec.structs.replace(sealed, root=seals.root_of(ends).hex())
    forge(database_settings, sealed.position + 1, data=msgspec.json.encode(forged, order="deterministic").decode())
    heads(database_settings)
    assert store.check().num_seals == 1
    for kept in (KeptSeal(sealed.root, sealed.position), KeptSeal(sealed.root)):
        with pytest.raises(Corrupt, match="I15"):
            store.check(seal=kept)


def heads(settings: Settings) -> None:
    """Make `streams` say what the forged chains end in."""
    with as_owner(settings) as connection:
        for row in connection.execute(sa.select(t.events).order_by(t.events.c.position)).mappings().all():
            values = {"version": row["stream_version"], "head_hash": row["hash"]}
            connection.execute(t.streams.update().where(t.streams.c.stream == row["stream"]).values(**values))


def test_a_seal_over_what_is_not_there_is_refused(store: EventStore) -> None:
    live(store)
    with pytest.raises(Corrupt, match="does not go so far"):
        store.check(seal=KeptSeal("00" * 32, store.head() + 1))


def test_the_leader_seals_from_time_to_time(sqlite_store: EventStore, settings: Settings) -> None:
    often = msgspec.structs.replace(settings, seal_every_hours=0.5 / 3600)
    with serving(sqlite_store, often):
        eventually(lambda: sqlite_store.newest_seal() is not None)
    seal = sqlite_store.read(types=["log.sealed"])[0]
    assert seal.stream == "system/log" and seal.actor is not None
    assert sqlite_store.check().num_seals >= 1
