"""Event <-> stored form."""

import threading
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import log
from tinkerbell.errors import Corrupt, InvalidRequest
from tinkerbell.events import codec, kinds
from tinkerbell.events.chain import GENESIS, HASHED, link
from tinkerbell.types import AdamParams, LoraConfig


def test_json_is_canonical() -> None:
    assert codec.canonical_json({"b": 1.0, "a": [1e-4, "\u00e9"]}) == '{"a":[0.0001,"\u00e9"],"b":1.0}'


@pytest.mark.parametrize("type_", sorted(log.every_type()))
def test_every_event_comes_back_the_same(type_: str) -> None:
    event, body = log.examples()[type_]
    prepared = codec.prepare(log.request(event, body=body))
    assert prepared.type == type_
    assert codec.decode_event(type_, prepared.schema_version, prepared.data) == event
    if body is not None:
        assert prepared.body is not None and prepared.body_codec is not None
        assert codec.decode_body(type_, prepared.body_codec, prepared.body) == body


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_come_back_bit_for_bit(value: float) -> None:
    event = kinds.ForwardCompleted(loss=value, metrics={"m": value}, num_tokens=1)
    decoded = codec.decode_event("forward.completed", 1, codec.encode_event(event))
    assert isinstance(decoded, kinds.ForwardCompleted)
    assert decoded.loss.hex() == value.hex() == decoded.metrics["m"].hex()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_json_does_not_have_are_refused(value: float) -> None:
    for event in (
        kinds.ForwardCompleted(loss=value, metrics={}, num_tokens=1),
        kinds.ForwardCompleted(loss=0.0, metrics={"m": value}, num_tokens=1),
        kinds.OptimStepRequested(adam=AdamParams(learning_rate=value)),
    ):
        with pytest.raises(InvalidRequest, match="finite"):
            codec.encode_event(event)


def test_lists_in_the_place_of_tuples_are_fine() -> None:
    event = kinds.AddLoraRequested(base_model="m", lora=LoraConfig(targets=["mlp"]), seed=1)  # type: ignore[arg-type]
    assert codec.encode_event(event) == codec.encode_event(
        msgspec.json.decode(msgspec.json.encode(event), type=type(event))
    )


def test_a_null_that_is_meant_is_no_number() -> None:
    event = kinds.SaveRequested(checkpoint="null", name=None)
    assert codec.decode_event("save.requested", 1, codec.encode_event(event)) == event


def test_old_versions_are_brought_to_the_present_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_1(data: dict[str, Any]) -> dict[str, Any]:
        return {"type": data["type"], "rate": data["lr"]}

    def from_2(data: dict[str, Any]) -> dict[str, Any]:
        return {"type": data["type"], "adam": {"learning_rate": data["rate"]}}

    monkeypatch.setitem(codec.VERSION_OF, "optim_step.requested", 3)
    monkeypatch.setitem(codec.UPCASTERS, ("optim_step.requested", 1), from_1)
    monkeypatch.setitem(codec.UPCASTERS, ("optim_step.requested", 2), from_2)
    expected = kinds.OptimStepRequested(adam=AdamParams(learning_rate=0.5))
    old = '{"lr":0.5,"type":"optim_step.requested"}'
    assert codec.decode_event("optim_step.requested", 1, old) == expected
    assert codec.decode_event("optim_step.requested", 2, old.replace("lr", "rate")) == expected
    assert codec.prepare(log.optim_step()).schema_version == 3
    with pytest.raises(Corrupt, match="newer release"):
        codec.decode_event("optim_step.requested", 4, old)
    monkeypatch.delitem(codec.UPCASTERS, ("optim_step.requested", 2))
    with pytest.raises(Corrupt, match="cannot be brought"):
        codec.decode_event("optim_step.requested", 1, old)


@pytest.mark.parametrize("data", ["", "{}", "[]", '{"type":"nothing.happened"}', '{"type":"save.requested"}'])
def test_data_that_is_no_event_is_corrupt(data: str) -> None:
    with pytest.raises(Corrupt):
        codec.decode_event("save.requested", 1, data)


def test_bodies_are_compressed_only_where_it_helps() -> None:
    zeros = kinds.SampleBody(prompt=bytes(10_000))
    stored, how, length = codec.encode_body(zeros)
    assert how == "zstd" and len(stored) < 100 and length > 10_000
    tiny = kinds.SampleBody(prompt=b"abcd")
    stored, how, length = codec.encode_body(tiny)
    assert (how, length) == ("msgpack", len(stored))
    for codec_, bytes_ in (("zstd", b"garbage"), ("msgpack", b"\x93garbage"), ("msgpack", b"")):
        with pytest.raises(Corrupt):
            codec.decode_body("sample.requested", codec_, bytes_)


def test_bodies_are_encoded_by_many_threads_at_once() -> None:
    body = kinds.ForwardBackwardBody(data=[log.datum(200)] * 20)
    expected = codec.encode_body(body)
    wrong = []

    def run() -> None:
        for _ in range(50):
            stored, how, length = codec.encode_body(body)
            if (stored, how, length) != expected or codec.decode_body("forward.requested", how, stored) != body:
                wrong.append(stored)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


VALUES = st.none() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5) | st.binary(max_size=5)


@given(st.lists(VALUES, min_size=len(HASHED), max_size=len(HASHED)), st.integers(0, len(HASHED) - 1), VALUES)
def test_rows_that_differ_have_other_hashes(values: list[Any], index: int, other: Any) -> None:
    row = dict(zip(HASHED, values, strict=True))
    changed = {**row, HASHED[index]: other}
    same = other == values[index] and type(other) is type(values[index])
    assert (link(GENESIS, row, {}) == link(GENESIS, changed, {})) == same


def test_neighbours_cannot_trade_characters() -> None:
    row: dict[str, Any] = {**dict.fromkeys(HASHED), "stream": "ab", "type": "c"}
    assert link(GENESIS, row, {}) != link(GENESIS, {**row, "stream": "a", "type": "bc"}, {})
    assert link(GENESIS, row, {"a": b"1"}) != link(GENESIS, row, {"a1": b""})
    assert link(GENESIS, row, {"a": b"1", "b": b"2"}) == link(GENESIS, row, {"b": b"2", "a": b"1"})
    assert link(b"\1" * 32, row, {}) != link(GENESIS, row, {})
