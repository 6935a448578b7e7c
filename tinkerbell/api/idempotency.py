"""Which request an idempotency key stands for."""

from tinkerbell.errors import IdempotencyConflict
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.store import EventStore
from tinkerbell.types import TenantId


def find(store: EventStore, tenant: TenantId, key: str | None, asked: bytes | None) -> Recorded | None:
    """The request that has this key already, `asked` being the hash of the present one.

    Raises IdempotencyConflict where it is another request.
    """
    if key is None or (original := store.original(tenant, key)) is None:
        return None
    if original.request_hash != asked:
        raise IdempotencyConflict("this idempotency key was used for another request")
    return original.recorded
