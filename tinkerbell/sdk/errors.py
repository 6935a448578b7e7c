"""What a training script can catch, on top of the server's own errors.

TinkerbellError                    (tinkerbell.errors; a refused call raises the class its problem names)
├── UserError, ServerError, ...        as drawn there
├── RequestFailed                  accepted, and then its future failed
│   ├── RequestFailedByUser            also a UserError: the request has to change
│   └── RequestFailedByServer          also a ServerError: the same request may work later
└── Unreachable                    no answer at all for as long as the client was told to try
"""

import json
from typing import Any

import msgspec

from tinkerbell import errors, wire
from tinkerbell.errors import ServerError, TinkerbellError, UserError

PROBLEM_PREFIX = "urn:tinkerbell:problem:"


class RequestFailed(TinkerbellError):
    """The request was accepted, but it could not be carried out."""

    slug = "request-failed"

    def __init__(self, future_id: int, failure: wire.Failure) -> None:
        super().__init__(f"{failure.message} [{failure.code}, future {future_id}]")
        self.future_id = future_id
        self.code = failure.code
        """Problem slug of the failure."""
        self.message = failure.message


class RequestFailedByUser(RequestFailed, UserError):
    """The request has to change before it can work."""

    slug = "request-failed"


class RequestFailedByServer(RequestFailed, ServerError):
    """Nothing is wrong with the request."""

    slug = "request-failed"


class Unreachable(TinkerbellError):
    """The server did not answer."""

    slug = "unreachable"
    status = 503


def request_failed(future_id: int, failure: wire.Failure) -> RequestFailed:
    """The exception of a failed future, by its category."""
    cls = RequestFailedByUser if failure.category == "user" else RequestFailedByServer
    return cls(future_id, failure)


def error_of(status: int, content: bytes) -> TinkerbellError:
    """The exception of an answer that is no success: by the slug of its problem body (RFC 9457), else by
    status.

    Members of the body besides the standard ones become `extra`.
    """
    try:
        members = msgspec.json.decode(content, type=dict[str, Any])
        problem = msgspec.convert(members, wire.Problem)
    except msgspec.DecodeError:
        # Not a Tinkerbell server's words: most likely a proxy's page.
        text = content[:200].decode("utf-8", "replace").strip()
        return _of_status(status)(f"HTTP {status}: {text or 'no body'}")
    extra = {key: value for key, value in members.items() if key not in wire.Problem.__struct_fields__}
    slug = problem.type.removeprefix(PROBLEM_PREFIX)
    cls = _BY_SLUG.get(slug) if problem.type.startswith(PROBLEM_PREFIX) else None
    detail = problem.detail if not extra else f"{problem.detail} {json.dumps(extra)}"
    return (cls or _of_status(status))(detail, **extra)


def _of_status(status: int) -> type[TinkerbellError]:
    return UserError if 400 <= status < 500 else ServerError


def _tree(cls: type[TinkerbellError]) -> list[type[TinkerbellError]]:
    return [cls, *(below for child in cls.__subclasses__() for below in _tree(child))]


_BY_SLUG = {cls.slug: cls for cls in _tree(TinkerbellError) if cls.__module__ == errors.__name__}
