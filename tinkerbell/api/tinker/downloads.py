"""Addresses that give one file of a checkpoint to whoever has them, for a while: the SDK fetches them without a key."""

import base64
import binascii
import hmac
import time

import msgspec

from tinkerbell.errors import NotFound
from tinkerbell.events.store import EventStore
from tinkerbell.types import CheckpointId, TenantId

_LABEL = b"tinkerbell download\0"


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """What an address stands for."""

    tenant: TenantId
    checkpoint: CheckpointId
    file: str
    expires_s: int
    """Seconds since 1970."""
    key_id: str | None = None
    """The API key that it was given to, and ends with; None without keys."""


def issue(store: EventStore, ticket: Ticket) -> str:
    """The last part of the address."""
    return _signed(store, msgspec.json.encode(ticket))


def redeem(store: EventStore, text: str) -> Ticket:
    """Raises NotFound for what was not issued here, or is over."""
    if not text.isascii():
        raise NotFound("There is no such download.")
    content = text.partition(".")[0]
    try:
        raw = base64.b64decode(content + "=" * (-len(content) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise NotFound("There is no such download.") from error
    if not hmac.compare_digest(_signed(store, raw).encode(), text.encode()):
        raise NotFound("There is no such download.")
    ticket = msgspec.json.decode(raw, type=Ticket)
    if time.time() >= ticket.expires_s:
        raise NotFound("This download has expired; ask for its address again.")
    return ticket


def _signed(store: EventStore, content: bytes) -> str:
    return f"{_text(content)}.{_text(store.authenticate(_LABEL + content))}"


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
