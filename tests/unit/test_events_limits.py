"""What could not be read back is not written, whatever built it: every limited field of every kind of event."""

import msgspec
import pytest

from tests.support import limits, log
from tinkerbell.errors import InvalidRequest
from tinkerbell.events import codec, kinds
from tinkerbell.events.kinds import NewEvent
from tinkerbell.types import SamplingParams


@pytest.mark.parametrize("type_", sorted(log.every_type()))
def test_a_field_beyond_its_limits_is_refused_by_name_and_one_at_them_is_not(type_: str) -> None:
    event, _ = log.examples()[type_]
    for each in limits.varied(event):
        if each.fits:
            data = codec.encode_event(each.struct)  # type: ignore[arg-type]
            assert codec.decode_event(type_, codec.VERSION_OF.get(type_, 1), data) == each.struct
            continue
        with pytest.raises(InvalidRequest) as refused:
            codec.encode_event(each.struct)  # type: ignore[arg-type]
        assert each.field in refused.value.detail, each


def test_the_walk_finds_limits_of_every_sort() -> None:
    fields = {each.field for event, _ in log.examples().values() for each in limits.varied(event) if not each.fits}
    assert {"params.stop", "params.stop_tokens", "adam.beta1", "lora.targets", "loss.config", "metrics"} <= fields


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"a": {"b": [1.0, float("nan")]}}, "user_metadata.a.b[1]"),
        ({"a\0": 1}, "user_metadata"),
        ({"a": "\ud800"}, "user_metadata.a"),
    ],
)
def test_metadata_names_the_place(value: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidRequest, match=told.replace("[", r"\[")):
        codec.encode_event(kinds.SessionStarted(session="se", client="c", user_metadata=value))


def test_metadata_that_no_reader_could_follow_is_refused() -> None:
    value: dict[str, object] = {}
    for _ in range(5000):
        value = {"a": value}
    with pytest.raises(InvalidRequest, match="nested"):
        codec.encode_event(kinds.SessionStarted(session="se", client="c", user_metadata=value))


def test_a_body_of_the_wrong_values_is_refused() -> None:
    (event, body) = log.examples()["sample.completed"]
    assert isinstance(body, kinds.SamplesBody)
    wrong = msgspec.structs.replace(body.sequences[0], stop_reason="tired")
    new = NewEvent(event=event, tenant="a", stream="tenant/a", body=msgspec.structs.replace(body, sequences=[wrong]))
    with pytest.raises(InvalidRequest, match="body"):
        codec.prepare(new)


@pytest.mark.parametrize("field", ["tenant", "stream", "adapter", "correlation", "actor", "idempotency_key"])
@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_text_that_is_no_unicode_is_refused_by_name(field: str, text: str) -> None:
    new = NewEvent(event=kinds.RemoveLoraRequested(), tenant="a", stream="adapter/a", request_hash=bytes(32))
    with pytest.raises(InvalidRequest, match=field):
        codec.prepare(msgspec.structs.replace(new, **{field: text}))


def test_what_is_in_the_way_of_one_event_is_read_around() -> None:
    good = codec.encode_event(kinds.SampleRequested(params=SamplingParams(), num_tokens=7))
    for version, data in ((1, good.replace('"stop":[]', '"stop":[""]')), (2, good), (1, "{"), (1, '{"num_tokens":-1}')):
        found = codec.read_event("sample.requested", version, data)
        assert isinstance(found, kinds.Unreadable) and found.why
        assert kinds.type_of(found) == "sample.requested" and kinds.is_request(found)
        assert found.num_tokens == (7 if good[:20] in data else 0)
