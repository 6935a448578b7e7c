"""What admission knows of the log: facts read in the append transaction, and moved on with every event admitted."""

from collections import ChainMap
from collections.abc import Mapping, MutableMapping

import msgspec

from tinkerbell.events.kinds import Recorded
from tinkerbell.events.names import Holders, SavedName
from tinkerbell.events.projections import Cause
from tinkerbell.events.quotas import Holding


class StreamHead(msgspec.Struct, frozen=True):
    """Where a stream ends."""

    version: int
    hash: bytes


class AdapterFacts(msgspec.Struct, frozen=True):
    """What is known of an adapter at this point of the log."""

    tenant: str
    state: str
    next_seq: int
    done_seq: int
    num_parameters: int | None = None
    """None while unknown."""


class LeaseFacts(msgspec.Struct, frozen=True):
    """Who holds a lease."""

    holder: str
    epoch: int
    expires_us: int


class SessionFacts(msgspec.Struct, frozen=True):
    """What is known of a session."""

    tenant: str
    ended: bool


class CheckpointFacts(msgspec.Struct, frozen=True):
    """Whether a saved checkpoint is still there."""

    tenant: str
    deleted: bool
    expires_us: int | None


class Original(msgspec.Struct, frozen=True):
    """What an idempotency key stands for."""

    request_hash: bytes
    recorded: Recorded


class State(msgspec.Struct):
    """The facts that admission needs, for the streams, adapters, requests, keys, leases, sessions and blobs of one
    group."""

    position: int
    streams: MutableMapping[str, StreamHead]
    originals: MutableMapping[tuple[str, str], Original]
    adapters: MutableMapping[str, AdapterFacts]
    causes: MutableMapping[int, Cause]
    leases: MutableMapping[str, LeaseFacts]
    sessions: MutableMapping[str, SessionFacts]
    names: MutableMapping[SavedName, Holders]
    checkpoints: MutableMapping[str, CheckpointFacts]
    blobs: Mapping[bytes, int]
    """Lengths of the shared blobs that are there, by hash. Within a group none of them goes."""
    holdings: MutableMapping[str, Holding]
    """Of the tenants whose limits hold for events of the group."""

    def fork(self) -> "State":
        """A state whose changes can be thrown away."""
        return State(
            self.position,
            ChainMap({}, self.streams),
            ChainMap({}, self.originals),
            ChainMap({}, self.adapters),
            ChainMap({}, self.causes),
            ChainMap({}, self.leases),
            ChainMap({}, self.sessions),
            ChainMap({}, self.names),
            ChainMap({}, self.checkpoints),
            self.blobs,
            ChainMap({}, self.holdings),
        )

    def merge(self, fork: "State") -> None:
        """Take over a fork's changes."""
        self.position = fork.position
        for name in (
            *("streams", "originals", "adapters", "causes", "leases", "sessions", "names", "checkpoints"),
            "holdings",
        ):
            getattr(self, name).update(getattr(fork, name).maps[0])
