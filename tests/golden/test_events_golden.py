"""The stored bytes of every kind of event: what was written once must be read for ever.

`events.json` has an entry for each form that an event of a version of a type ever had, oldest first. A changed entry
means that logs out there cannot be read any more: keep it. After a field was added, which has a default, add the new
bytes with `python -m tests.golden.test_events_golden`; after a meaning changed, raise the version in
codec.VERSION_OF and add an upcaster, too.
"""

import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support import log
from tinkerbell.events import codec, kinds
from tinkerbell.events.chain import GENESIS, HASHED, link
from tinkerbell.types import DatumOutputs, PromptScores, SampledSequence

GOLDEN = Path(__file__).parent / "events.json"


def encoded() -> list[dict[str, Any]]:
    """The examples as they are stored today. The body is before compression: zstd may give other bytes any day."""
    entries = []
    for type_, (event, body) in sorted(log.examples().items()):
        raw = codec.body_bytes(body) if body is not None else None
        entries.append(
            {
                "type": type_,
                "schema_version": codec.VERSION_OF.get(type_, 1),
                "data": codec.encode_event(event),
                "body": base64.b64encode(raw).decode() if raw is not None else None,
            }
        )
    return entries


def golden() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = msgspec.json.decode(GOLDEN.read_bytes())
    return entries


def test_every_type_has_an_example_and_golden_bytes() -> None:
    assert set(log.examples()) == log.every_type()
    assert {entry["type"] for entry in golden()} == log.every_type()


def test_todays_encoding_is_the_golden_one() -> None:
    kept = {(entry["type"], entry["schema_version"]): entry for entry in golden()}
    for entry in encoded():
        assert kept[entry["type"], entry["schema_version"]] == entry


def as_written(value: Any, written: Any) -> Any:
    """The example, with the defaults of the fields that were added, to it or within it, after `written` was."""
    if not isinstance(value, msgspec.Struct) or not isinstance(written, dict):
        return value
    fields = {
        field.name: as_written(getattr(value, field.name), written[field.name])
        if field.name in written
        else default_of(field)
        for field in msgspec.structs.fields(value)
    }
    return type(value)(**fields)


def default_of(field: msgspec.structs.FieldInfo) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    assert field.default is not msgspec.NODEFAULT, f"{field.name} is new and has no default"
    return field.default


@pytest.mark.parametrize("entry", golden(), ids=lambda entry: f"{entry['type']}-{entry['schema_version']}")
def test_golden_bytes_are_read(entry: dict[str, Any]) -> None:
    event, body = log.examples()[entry["type"]]
    decoded = codec.decode_event(entry["type"], entry["schema_version"], entry["data"])
    assert decoded == as_written(event, msgspec.json.decode(entry["data"])) and type(decoded) is type(event)
    if entry["body"] is not None:
        assert codec.decode_body(entry["type"], "msgpack", base64.b64decode(entry["body"])) == body
    else:
        assert body is None


def test_outputs_of_a_forward_are_read_and_written_as_they_were() -> None:
    outputs = DatumOutputs(entropy=b"e" * 4, top_tokens=b"t" * 8, top_logprobs=b"l" * 8)
    body = kinds.OutputsBody([b"p" * 4], [outputs])
    raw = base64.b64decode("kpHEBHBwcHCRlcQEZWVlZcDECHR0dHR0dHR0xAhsbGxsbGxsbMA=")
    assert msgspec.msgpack.encode(body) == raw
    assert codec.decode_body("forward.completed", "msgpack", raw) == body


def test_a_sample_that_asks_for_no_more_has_the_body_it_always_had() -> None:
    asked, answered = kinds.SampleBody(b"p" * 4), kinds.SamplesBody([], b"q" * 4)
    assert codec.body_bytes(asked) == b"\x91\xc4\x04pppp"
    assert codec.body_bytes(answered) == b"\x92\x90\xc4\x04qqqq"
    assert codec.decode_body("sample.requested", "msgpack", codec.body_bytes(asked)) == asked
    assert codec.decode_body("sample.completed", "msgpack", codec.body_bytes(answered)) == answered


def test_what_samples_answer_of_distributions_is_read_and_written_as_it_was() -> None:
    asked = kinds.SampleBody(b"p" * 4, b"t" * 8)
    sequence = SampledSequence(b"s" * 4, b"l" * 4, "length", b"t" * 8, b"k" * 8)
    scores = PromptScores(top_tokens=b"a" * 4, top_logprobs=b"b" * 4, target_logprobs=b"c" * 4)
    answered = kinds.SamplesBody([sequence], None, scores)
    raw = (
        base64.b64decode("ksQEcHBwcMQIdHR0dHR0dHQ="),
        base64.b64decode(
            "k5GVxARzc3NzxARsbGxspmxlbmd0aMQIdHR0dHR0dHTECGtra2tra2trwIOqdG9wX3Rva2Vuc8QEYWFhYax0b3BfbG9ncHJvYnPEBGJiYmKvdGFyZ2V0X2xvZ3Byb2JzxARjY2Nj"
        ),
    )
    assert (codec.body_bytes(asked), codec.body_bytes(answered)) == raw
    assert codec.decode_body("sample.requested", "msgpack", raw[0]) == asked
    assert codec.decode_body("sample.completed", "msgpack", raw[1]) == answered


def test_a_body_compressed_long_ago_is_read() -> None:
    stored = base64.b64decode("KLUv/SBODQEAuJGRk8QUAQAAAAIAxBQAgad3ZWlnaHRzAwBCKQckQwZe")
    raw = msgspec.msgpack.encode([[[b"\1\0\0\0\2\0\0\0" + bytes(12), b"\0" * 20, {"weights": b"\0" * 20}]]])
    body = codec.decode_body("forward_backward.requested", "zstd", stored)
    assert body == codec.decode_body("forward_backward.requested", "msgpack", raw)


def test_the_chain_is_the_one_of_the_first_release() -> None:
    row: dict[str, Any] = dict.fromkeys(HASHED)
    row |= {"position": 1, "stream": "adapter/ad_one", "stream_version": 0, "type": "optim_step.requested"}
    row |= {"schema_version": 1, "tenant": "alice", "data": "{}", "num_blobs": 1, "created_us": 1_700_000_000_000_000}
    digest = link(GENESIS, row, {"weights": b"\2" * 32})
    assert digest.hex() == "1a1e7c698582f9bcba08324c67ca9bfe0cf4790f6dc45487810d8a8418f765df"


if __name__ == "__main__":
    old = golden()
    new = [entry for entry in encoded() if entry not in old]
    GOLDEN.write_bytes(msgspec.json.format(msgspec.json.encode(old + new), indent=1) + b"\n")
