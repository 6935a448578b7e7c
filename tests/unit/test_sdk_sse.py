"""Server-sent events, line by line."""

from tinkerbell.sdk.sse import Message, Parser


def parse(text: str) -> list[Message]:
    parser = Parser()
    return [message for line in text.split("\n") if (message := parser.feed(line)) is not None]


def test_a_message_ends_at_the_blank_line() -> None:
    assert parse("id: 7\nevent: x\ndata: one\ndata: two\n") == [Message("x", "one\ntwo", "7")]
    assert parse("id: 7\nevent: x\ndata: one") == []


def test_comments_and_unknown_fields_are_passed_over() -> None:
    assert parse(": ping\n\nretry: 5\nnonsense\ndata:a\n") == [Message("message", "a", "")]


def test_the_id_lasts_and_the_event_does_not() -> None:
    assert parse("id: 7\nevent: x\ndata: a\n\ndata: b\n\n") == [
        Message("x", "a", "7"),
        Message("message", "b", "7"),
    ]


def test_one_space_after_the_colon_is_dropped() -> None:
    assert parse("data:  a: b\n") == [Message("message", " a: b", "")]


def test_an_event_without_data_is_none() -> None:
    assert parse("event: x\n\ndata:\n") == [Message("message", "", "")]
