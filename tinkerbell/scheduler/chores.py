"""All that a leader does from time to time beside its work."""

from tinkerbell.config import Settings
from tinkerbell.events.leases import Lease
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler import superseding
from tinkerbell.scheduler.chore import Chore
from tinkerbell.scheduler.sealing import Sealer
from tinkerbell.scheduler.session_expiry import SessionClearing, SessionExpiry
from tinkerbell.scheduler.sweeping import Sweeping


def chores_of(store: EventStore, lease: Lease, settings: Settings) -> list[Chore]:
    """Those of one leadership."""
    every_h = settings.seal_every_hours
    return [
        Sealer(store, lease, None if every_h is None else every_h * 3600),
        SessionExpiry(store, lease, settings.session_expiry_s),
        SessionClearing(store, lease),
        superseding.Superseding(store, lease, settings.recovery_points_kept, superseding.EVERY_S),
        Sweeping(store, settings.orphan_grace_s),
    ]
