"""Log lines on standard error: one line an event, as text for people or JSON for machines."""

import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

LogFormat = Literal["text", "json"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def facts(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed as `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def stamp(record: logging.LogRecord) -> str:
    """RFC 3339, UTC, milliseconds."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO scheduler: batch ran batch=3.17 tokens=4096`"""

    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(f" {name}={self._value(value)}" for name, value in facts(record).items())
        source = record.name.removeprefix("tinkerbell.")
        line = f"{stamp(record)} {record.levelname} {source}: {self._one_line(record.getMessage())}{pairs}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line

    @staticmethod
    def _one_line(text: str) -> str:
        # A request path or a tenant's text must not be able to forge a second line.
        return text if text.isprintable() else text.encode("unicode_escape").decode()

    def _value(self, value: Any) -> str:
        text = self._one_line(str(value))
        return f'"{text}"' if " " in text else text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: at, level, logger, message, the facts, and exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            **facts(record),
            "at": stamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def configure(level: str, log_format: LogFormat) -> None:
    """Send everything to standard error; libraries speak from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tinkerbell").setLevel(level.upper())
    logging.captureWarnings(True)
