"""Every expected failure, each with its problem slug, HTTP status and category.

    TinkerbellError
    ├── UserError                      the caller can mend it (category user)
    │   ├── InvalidRequest             400  the body or a parameter is not acceptable
    │   │   └── SessionOver                 nothing more can be made within it
    │   ├── Unauthorized               401
    │   ├── Forbidden                  403
    │   ├── NotFound                   404  also for what belongs to another tenant
    │   ├── Conflict                   409
    │   │   ├── IdempotencyConflict         same key, other request
    │   │   ├── SequenceConflict            `seq` is not the adapter's next one
    │   │   └── OtherBaseModel              the adapter or checkpoint belongs to a model that is not served
    │   ├── Gone                       410
    │   │   ├── Erased                      with its tenant
    │   │   └── Compacted                   by `tinkerbell db compact`
    │   ├── TooLarge                   413
    │   │   └── QuotaExceeded               more than the tenant may have
    │   └── TooManyRequests            429  carries retry_after_s and place
    └── ServerError                    whoever runs the server can mend it (category server)
        ├── Unavailable                503
        │   └── StorageUnavailable          the disk is full, or the like
        ├── SchemaOutdated                  the database needs `tinkerbell db upgrade`
        ├── KeyUnavailable                  the key file is missing or another one
        ├── MissingPackage                  names the install command
        ├── Fenced                          a lease was lost: results are refused
        ├── AlreadyAnswered                 a request may have one terminal event only
        ├── ExecutorDied                    the executor process ended
        └── Corrupt                         the log or a blob is not what it was

A class's docstring is the title a caller reads.
"""

import re
from typing import Any, ClassVar

from tinkerbell.types import Category

SHOWN_CHARACTERS = 100
MESSAGE_CHARACTERS = 2000


def shown(value: object) -> str:
    """What a caller sent, as a message quotes it: the beginning is enough to recognise it."""
    whole = value[: SHOWN_CHARACTERS + 1] if isinstance(value, str | bytes | list | tuple) else value
    text = repr(whole)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


_RUN = re.compile(rf"(\S{{{SHOWN_CHARACTERS}}})\S+")


def brief(text: str) -> str:
    """A message of a library, which may quote what a caller sent."""
    return _RUN.sub(r"\1...", text[:MESSAGE_CHARACTERS])


class TinkerbellError(Exception):
    """Something went wrong."""

    slug: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    category: ClassVar[Category] = "server"

    def __init__(self, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra = extra
        """Further members of the problem body (RFC 9457 section 3.2)."""


class UserError(TinkerbellError):
    """The request cannot be carried out as it stands."""

    slug = "user-error"
    status = 400
    category: ClassVar[Category] = "user"


class InvalidRequest(UserError):
    """The request is not valid."""

    slug = "invalid-request"


class SessionOver(InvalidRequest):
    """The session has ended."""

    slug = "session-over"


class Unauthorized(UserError):
    """An API key is needed."""

    slug = "unauthorized"
    status = 401


class Forbidden(UserError):
    """This key may not do that."""

    slug = "forbidden"
    status = 403


class NotFound(UserError):
    """There is no such thing."""

    slug = "not-found"
    status = 404


class Conflict(UserError):
    """The request contradicts what has happened already."""

    slug = "conflict"
    status = 409


class IdempotencyConflict(Conflict):
    """This idempotency key was used for another request."""

    slug = "idempotency-conflict"


class NameTaken(Conflict):
    """Another checkpoint has this name."""

    slug = "name-taken"


class SequenceConflict(Conflict):
    """The sequence number is not the adapter's next one."""

    slug = "sequence-conflict"


class OtherBaseModel(Conflict):
    """This belongs to another base model than the one that is served."""

    slug = "other-base-model"


class Gone(UserError):
    """What was here was removed."""

    slug = "gone"
    status = 410


class Erased(Gone):
    """What was here was erased with its tenant."""

    slug = "erased"


class Compacted(Gone):
    """What was here was removed because it was old."""

    slug = "compacted"


class TooLarge(UserError):
    """The request is too large."""

    slug = "too-large"
    status = 413


class QuotaExceeded(TooLarge):
    """This is more than you may have."""

    slug = "quota-exceeded"


class TooManyRequests(UserError):
    """Too much is waiting already."""

    slug = "too-many-requests"
    status = 429


class ServerError(TinkerbellError):
    """The server could not do it."""

    slug = "server-error"


class Unavailable(ServerError):
    """The server is not ready for this yet."""

    slug = "unavailable"
    status = 503


class StorageUnavailable(Unavailable):
    """The server cannot store this for now."""

    slug = "storage-unavailable"


class SchemaOutdated(ServerError):
    """The database schema is not the one this release needs."""

    slug = "schema-outdated"
    status = 503


class KeyUnavailable(ServerError):
    """What is encrypted cannot be read or written without its key."""

    slug = "key-unavailable"
    status = 503


class MissingPackage(ServerError):
    """A package this needs is not installed."""

    slug = "missing-package"


class Fenced(ServerError):
    """The lease was lost; nothing was written."""

    slug = "fenced"
    status = 409


class AlreadyAnswered(ServerError):
    """The request has its result already, or an earlier one of its adapter has not."""

    slug = "already-answered"
    status = 409


class ExecutorDied(ServerError):
    """The executor process ended before it answered."""

    slug = "executor-died"
    status = 503


class Corrupt(ServerError):
    """Stored bytes are not the bytes that were written."""

    slug = "corrupt"


UNREADABLE = (Corrupt, KeyUnavailable, Gone)
"""What reading an event, its body or a blob raises where trying again does not help: whoever needs it cannot go on, and
everybody else can. Errors of the operating system are Unavailable."""
