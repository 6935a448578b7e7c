"""Names of saved checkpoints."""

from typing import NamedTuple

from tinkerbell.events import kinds
from tinkerbell.types import AdapterId, CheckpointId, CheckpointUse


class SavedName(NamedTuple):
    """What one checkpoint at a time may be called."""

    adapter: AdapterId
    use: CheckpointUse
    name: str


Holders = dict[CheckpointId, int | None]
"""Checkpoints that have a name -> microseconds since 1970 at which they expire; None: never, or not saved yet."""


def name_of(event: kinds.AnyRead, adapter: AdapterId | None) -> SavedName | None:
    """The name that a save asks for."""
    if not isinstance(event, kinds.SaveRequested) or event.name is None or adapter is None:
        return None
    return SavedName(adapter, event.use, event.name)


def living(found: Holders, now_us: int) -> set[CheckpointId]:
    """Those that have not expired."""
    return {id_ for id_, expires_us in found.items() if expires_us is None or now_us < expires_us}
