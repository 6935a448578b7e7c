"""Server-sent events, from lines of text to messages (WHATWG HTML, section 9.2.6)."""

import msgspec


class Message(msgspec.Struct, frozen=True):
    """One dispatched event of the stream."""

    event: str
    data: str
    id: str


class Parser:
    """Feed it lines without their line ends; every blank line that closes an event gives a Message."""

    def __init__(self) -> None:
        self._event = ""
        self._data: list[str] = []
        self._id = ""

    def feed(self, line: str) -> Message | None:
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
