"""Server-sent events, from pieces of text to messages (WHATWG HTML, section 9.2.6)."""

import re
from collections.abc import Iterator

import msgspec

_LINE_END = re.compile(r"\r\n|\n|\r")
"""Nothing else ends a line here, whatever Unicode says of other characters."""


class Message(msgspec.Struct, frozen=True):
    """One dispatched event of the stream."""

    event: str
    data: str
    id: str


class Parser:
    """Feed it text as it comes; every blank line that closes an event gives a Message."""

    def __init__(self) -> None:
        self._rest = ""
        """Begins a line that has not ended yet."""
        self._event = ""
        self._data: list[str] = []
        self._id = ""

    @property
    def id(self) -> str:
        """The last one the stream gave, also without an event; empty before the first."""
        return self._id

    def feed(self, text: str) -> Iterator[Message]:
        """Take the next piece of the stream, which may end anywhere."""
        text = self._rest + text
        # A carriage return at the end may be the first half of a line end.
        held = "\r" if text.endswith("\r") else ""
        *lines, rest = _LINE_END.split(text.removesuffix(held))
        self._rest = rest + held
        for line in lines:
            if (message := self._line(line)) is not None:
                yield message

    def _line(self, line: str) -> Message | None:
        """Take one line; comments (keep-alives) and unknown fields are passed over as the standard says."""
        if line:
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "data":
                self._data.append(value)
            elif field == "event":
                self._event = value
            elif field == "id" and "\0" not in value:
                self._id = value
            return None
        event, data = self._event, self._data
        self._event, self._data = "", []
        return Message(event or "message", "\n".join(data), self._id) if data else None
