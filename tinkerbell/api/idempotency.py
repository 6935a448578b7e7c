"""Which request an idempotency key stands for."""

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from tinkerbell.api.requests import decode
from tinkerbell.errors import IdempotencyConflict
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.store import EventStore
from tinkerbell.types import AdapterId, TenantId


def find(store: EventStore, tenant: TenantId, key: str | None, asked: bytes | None) -> Recorded | None:
    """The request that has this key already, `asked` being the hash of the present one.

    Raises IdempotencyConflict where it is another request.
    """
    if key is None or (original := store.original(tenant, key)) is None:
        return None
    if original.request_hash != asked:
        raise IdempotencyConflict("this idempotency key was used for another request")
    return original.recorded


def request_hash(kind: str, path_id: AdapterId | None, raw: bytes, without: Sequence[str] = ("adapter_id",)) -> bytes:
    """sha256 over the kind of request, the adapter named by the caller, and the body in canonical JSON.

    The body as the caller sent it, so that neither generated ids nor a new release's defaults change it, less the
    fields `without`: the adapter of an alias's body counts as the path's, so that both ways to ask are one request.
    Raises InvalidRequest where the body is not JSON.
    """
    body: Any = decode(raw, Any) if raw else {}
    if isinstance(body, dict):
        for field in without:
            body.pop(field, None)
    canonical = msgspec.json.encode([kind, path_id, body], order="deterministic")
    return hashlib.sha256(canonical).digest()
