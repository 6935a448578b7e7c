"""The attacks by name."""

from collections.abc import Callable
from multiprocessing.synchronize import Event

import msgspec

from tinkerbell.cli.bench.attacks import bodies, connections, reads, work
from tinkerbell.cli.bench.attacks.target import Target


class Attack(msgspec.Struct, frozen=True):
    """What is done, by so many threads at a time."""

    run: Callable[[Target, Event], None]
    num_threads: int = 1

    @property
    def title(self) -> str:
        """A line about it."""
        return (self.run.__doc__ or "").strip()


ATTACKS: dict[str, Attack] = {
    "endless-header": Attack(connections.endless_header, 2),
    "slow-headers": Attack(connections.slow_headers),
    "idle-connections": Attack(connections.idle_connections),
    "unfinished-bodies": Attack(connections.unfinished_bodies),
    "event-streams": Attack(connections.event_streams),
    "zstd-bomb": Attack(bodies.zstd_bomb, 2),
    "many-lists": Attack(bodies.many_lists),
    "deep-lists": Attack(bodies.deep_lists, 4),
    "large-bodies": Attack(bodies.large_bodies, 2),
    "echoed-body": Attack(bodies.echoed_body),
    "runs": Attack(reads.runs, 16),
    "lists": Attack(reads.lists, 16),
    "far-offsets": Attack(reads.far_offsets, 16),
    "audit": Attack(reads.audit, 12),
    "session-search": Attack(reads.session_search, 8),
    "whole-log": Attack(reads.whole_log, 8),
    "prompt-draws": Attack(work.prompt_draws, 4),
    "top-tokens": Attack(work.top_tokens, 4),
    "training": Attack(work.training, 4),
    "saves": Attack(work.saves, 4),
    "adapters": Attack(work.adapters, 4),
    "sessions": Attack(work.sessions, 4),
    "long-polls": Attack(work.long_polls, 16),
}
