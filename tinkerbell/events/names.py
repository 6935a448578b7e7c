"""Names of saved checkpoints."""

from typing import NamedTuple

from tinkerbell.events import kinds
from tinkerbell.types import AdapterId, CheckpointId, CheckpointUse


class SavedName(NamedTuple):
    """What one checkpoint at a time may be called."""

    adapter: AdapterId
    use: CheckpointUse
    name: str


class Holder(NamedTuple):
    """How a checkpoint has a name."""

    saved: bool
    """Otherwise its save is under way."""
    expires_us: int | None
    """Microseconds since 1970; None: never."""


Holders = dict[CheckpointId, Holder]


def name_of(event: kinds.AnyRead, adapter: AdapterId | None) -> SavedName | None:
    """The name that a save asks for."""
    if not isinstance(event, kinds.SaveRequested) or event.name is None or adapter is None:
        return None
    return SavedName(adapter, event.use, event.name)


def living(found: Holders, now_us: int) -> set[CheckpointId]:
    """Those that have not expired."""
    return {id_ for id_, each in found.items() if each.expires_us is None or now_us < each.expires_us}
