"""Part of the check: what of the log this release cannot read, and which projections can therefore not be compared.

Nothing of it is wrong with the log: hashes are over stored bytes. An older release may have written what is not within
its own limits, a newer one knows more, a data key may be out of reach.
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from tinkerbell.errors import Corrupt, Gone, KeyUnavailable
from tinkerbell.events import codec, kinds
from tinkerbell.events import tables as t
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.projections import Cause, Key, fold
from tinkerbell.events.vault import Vault

_TABLES: dict[str, frozenset[str]] = {
    "batch": frozenset({"batches"}),
    "bulk": frozenset({"removed_bulk"}),
    "checkpoint": frozenset({"checkpoints", "adapters"}),
    "environment": frozenset({"environments"}),
    "key": frozenset({"api_keys"}),
    "lease": frozenset({"leases"}),
    "log": frozenset(),
    "sample": frozenset(),
    "sampler": frozenset({"samplers"}),
    "session": frozenset({"sessions"}),
    "tenant": frozenset({"tenants", "erasures", "adapters"}),
}
"""First word of a type that is neither request nor result -> projections that its events change."""
_EVERY_TABLE = frozenset(t.PROJECTIONS)


class Unread(msgspec.Struct, frozen=True, kw_only=True):
    """Something of the log that this release cannot read."""

    position: int
    type: str
    what: Literal["event", "body"]
    why: str


class Legibility:
    """Follows the log event by event, and keeps what could not be read."""

    def __init__(self, vault: Vault) -> None:
        self.found: list[Unread] = []
        self.costs_known = True
        """Whether every result says what it cost, and every batch whom it charged."""
        self._vault = vault
        self._positions: set[int] = set()
        self._tables: set[str] = set()
        self._rows: set[tuple[str, Key]] = set()

    def see(self, recorded: Recorded, cause: Cause | None) -> None:
        """The next event. `cause`: the request it answers."""
        event = recorded.event
        if not isinstance(event, kinds.Unreadable):
            return
        self._say(recorded, "event", event.why)
        self._positions.add(recorded.position)
        if kinds.is_request(event):
            self._rows |= {("adapters", (recorded.adapter,)), ("futures", (recorded.position,))}
            # How much it may come to is not known.
            self._rows.add(("lines", (recorded.tenant,)))
        elif cause is not None:
            # The rows of any answer are those of a failure, and its adapter's.
            failure = kinds.RequestFailed(category="server", code="", message="")
            changes = fold(msgspec.structs.replace(recorded, event=failure), cause)
            self._rows |= {(change.table, change.key) for change in changes} | {("adapters", (cause.adapter,))}
            self.costs_known = False
        else:
            self._tables |= _TABLES.get(event.type_.partition(".")[0], _EVERY_TABLE)
            self.costs_known &= event.type_ != "batch.ran"

    def see_body(self, recorded: Recorded, stored: bytes) -> None:
        """The stored body of this event, whose bytes are those that were written."""
        type_ = kinds.type_of(recorded.event)
        if type_ not in kinds.BODY_OF:
            return
        assert recorded.body_codec is not None
        try:
            codec.decode_body(type_, recorded.body_codec, self._vault.open(stored))
        except (Corrupt, KeyUnavailable, Gone) as exc:
            self._say(recorded, "body", exc.detail)

    def is_known(self, table: str, key: Key, row: Mapping[str, Any] | None) -> bool:
        """Whether this row of a projection follows from what could be read."""
        if table in self._tables or (table, key) in self._rows:
            return False
        return table != "checkpoints" or row is None or row["position"] not in self._positions

    def _say(self, recorded: Recorded, what: Literal["event", "body"], why: str) -> None:
        type_ = kinds.type_of(recorded.event)
        self.found.append(Unread(position=recorded.position, type=type_, what=what, why=why))
