"""Server-sent events, from pieces of text."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tinkerbell.sdk.sse import Message, Parser


def parse(*pieces: str) -> list[Message]:
    parser = Parser()
    return [message for piece in pieces for message in parser.feed(piece)]


def test_a_message_ends_at_the_blank_line() -> None:
    assert parse("id: 7\nevent: x\ndata: one\ndata: two\n\n") == [Message("x", "one\ntwo", "7")]
    assert parse("id: 7\nevent: x\ndata: one\n") == []


def test_comments_and_unknown_fields_are_passed_over() -> None:
    assert parse(": ping\n\nretry: 5\nnonsense\ndata:a\n\n") == [Message("message", "a", "")]


def test_the_id_lasts_and_the_event_does_not() -> None:
    assert parse("id: 7\nevent: x\ndata: a\n\ndata: b\n\n") == [
        Message("x", "a", "7"),
        Message("message", "b", "7"),
    ]


def test_one_space_after_the_colon_is_dropped() -> None:
    assert parse("data:  a: b\n\n") == [Message("message", " a: b", "")]


def test_an_event_without_data_is_none() -> None:
    assert parse("event: x\n\ndata:\n\n") == [Message("message", "", "")]


def test_an_id_alone_is_no_event_and_is_remembered() -> None:
    parser = Parser()
    assert list(parser.feed("id: 7\n: after 7\n\n")) == []
    assert parser.id == "7"


def test_only_the_line_ends_of_the_standard_end_lines() -> None:
    odd = "a\u2028b\u2029c\x85d\x0be\x0cf"
    assert parse(f"data: {odd}\r\n\r\ndata: {odd}\r\rdata: {odd}\n\n") == [Message("message", odd, "")] * 3


TEXT = "id: 7\r\nevent: x\r\ndata: one\r\n\r\n: ping\n\ndata: two\ndata: three\n\nid: 8\rdata: four\r\r\n"


@given(st.lists(st.integers(0, len(TEXT))))
def test_pieces_may_end_anywhere(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(TEXT)]
    pieces = [TEXT[start:stop] for start, stop in pairwise(bounds)]
    assert parse(*pieces) == parse(TEXT) == [
        Message("x", "one", "7"),
        Message("message", "two\nthree", "7"),
        Message("message", "four", "8"),
    ]  # fmt: skip
