"""Part of the check: seals are the roots of the log as it was when they were made (I15)."""

from typing import NoReturn

import msgspec
import sqlalchemy as sa

from tinkerbell.errors import Corrupt
from tinkerbell.events import seals
from tinkerbell.events.codec import read_event
from tinkerbell.events.kinds import LogSealed, Unreadable
from tinkerbell.events.tables import events


class KeptSeal(msgspec.Struct, frozen=True):
    """A root that somebody kept where the log cannot be written."""

    root: str
    """Hex."""
    position: int | None = None
    """What it covers; None: the log must have a seal with this root."""


class Seals:
    """Computes the root wherever a seal, or the one that was kept, says what it was."""

    def __init__(self, connection: sa.Connection, kept: KeptSeal | None) -> None:
        self.num_seals = 0
        self._kept = kept
        self._roots: dict[int, list[tuple[int | None, str]]] = {}
        """Covered position -> (position of the seal, root)."""
        columns = (events.c.position, events.c.type, events.c.schema_version, events.c.data)
        query = sa.select(*columns).where(events.c.stream == seals.STREAM).order_by(events.c.stream_version)
        known: set[str] = set()
        for row in connection.execute(query):
            event = read_event(row.type, row.schema_version, row.data)
            if isinstance(event, Unreadable):
                continue  # the check names it
            if not isinstance(event, LogSealed) or not 0 < event.position < row.position:
                _refuse(row.position, f"a seal cannot be a {row.type} over what comes later")
            self._roots.setdefault(event.position, []).append((row.position, event.root))
            known.add(event.root)
        if kept is not None and kept.position is not None:
            self._roots.setdefault(kept.position, []).append((None, kept.root))
        elif kept is not None and kept.root not in known:
            raise Corrupt(
                f"I15: no seal of this log has the root {kept.root}. Either it is another log's, or this log was"
                " written anew before it was sealed; with ROOT@POSITION the log itself is compared",
                invariant="I15",
            )

    def see(self, position: int, heads: seals.Heads) -> None:
        """Check the seals that cover the log up to here."""
        for at, root in self._roots.pop(position, ()):
            found = seals.root_of(heads).hex()
            if found != root:
                what = "the seal that was kept" if at is None else f"the seal at {at}"
                _refuse(position, f"{what} says {root} of the log up to here, which has the root {found}")
            self.num_seals += at is not None

    def end(self) -> None:
        """Check that nothing was sealed that is not there."""
        if self._roots:
            position = min(self._roots)
            _refuse(position, "it was sealed, and the log does not go so far")


def _refuse(position: int, why: str) -> NoReturn:
    raise Corrupt(f"I15 at position {position}: {why}", invariant="I15", position=position)
