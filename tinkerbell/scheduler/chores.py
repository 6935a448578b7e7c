"""All that a leader does from time to time beside its work."""

from collections.abc import Sequence
from concurrent.futures import wait

from tinkerbell.config import Settings
from tinkerbell.events.leases import Lease
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler import sampler_expiry, superseding
from tinkerbell.scheduler.chore import Chore
from tinkerbell.scheduler.sampler_expiry import SamplerExpiry
from tinkerbell.scheduler.sealing import Sealer
from tinkerbell.scheduler.session_expiry import SessionClearing, SessionExpiry
from tinkerbell.scheduler.sweeping import Sweeping

END_S = 1.0
"""How long the end of a leadership waits for them."""


def chores_of(store: EventStore, lease: Lease, settings: Settings) -> list[Chore]:
    """Those of one leadership."""
    every_h = settings.seal_every_hours
    return [
        Sealer(store, lease, None if every_h is None else every_h * 3600),
        SessionExpiry(store, lease, settings.session_expiry_s),
        SessionClearing(store, lease),
        superseding.Superseding(store, lease, settings.recovery_points_kept, superseding.EVERY_S),
        SamplerExpiry(
            store, lease, settings.unnamed_samplers_kept, settings.unnamed_sampler_idle_s, sampler_expiry.EVERY_S
        ),
        Sweeping(store, settings.orphan_grace_s),
    ]


def end(chores: Sequence[Chore]) -> None:
    """Wait a moment for what they are doing, after they were cancelled. Blocking."""
    for chore in chores:
        chore.over = True
    wait([chore.doing for chore in chores if chore.doing is not None], END_S)
