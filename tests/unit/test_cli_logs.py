"""Log lines: facts beside the message, and no text that could pass for a second line."""

import json
import logging
import sys
from typing import Any

from tinkerbell.cli.logs import JsonFormatter, TextFormatter


def record(message: str, *args: object, **facts: Any) -> logging.LogRecord:
    return logging.getLogger("tinkerbell.api").makeRecord(
        "tinkerbell.api", logging.INFO, "file.py", 1, message, args, None, extra=facts
    )


def test_text() -> None:
    line = TextFormatter().format(record("batch %s ran", "3.1", tokens=12, model="a b"))
    assert line.partition("Z ")[2] == 'INFO api: batch 3.1 ran tokens=12 model="a b"'


def test_text_stays_on_its_line() -> None:
    line = TextFormatter().format(record("GET /x\n2026-01-01T00:00:00.000Z INFO api: forged", path="a\nb"))
    assert len(line.splitlines()) == 1
    assert "path=a\\nb" in line


def test_json() -> None:
    line = json.loads(JsonFormatter().format(record("ran\n", tokens=12, other=object())))
    assert (line["level"], line["logger"], line["message"], line["tokens"]) == ("INFO", "tinkerbell.api", "ran\n", 12)


def test_exception_is_kept() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        made = logging.getLogger("x").makeRecord("x", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    assert "ValueError: why" in TextFormatter().format(made)
    assert "ValueError: why" in json.loads(JsonFormatter().format(made))["exception"]
