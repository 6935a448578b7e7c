"""Goes through the blob store while this process leads, for files that no event needs."""

import logging

from tinkerbell.events.store import EventStore
from tinkerbell.events.sweeping import Swept
from tinkerbell.scheduler.chore import PARTS, Chore

log = logging.getLogger("tinkerbell.scheduler")


class Sweeping(Chore):
    """Looks at every file twice in the time that one may lie there, a few parts of the store at a time."""

    put_off = "blob store not swept"

    def __init__(self, store: EventStore, grace_s: float | None) -> None:
        """`grace_s` None: never."""
        super().__init__(grace_s)
        self._store = store
        self._left: list[str] = []
        self._at_once = 1

    def do(self, every_s: float) -> None:
        """The next parts."""
        if not self._left:
            self._left = self._store.sweeper.parts()
            self._at_once = -(-len(self._left) * 2 // PARTS)
        swept = Swept()
        for _ in range(self._at_once):
            if not self._left or self.over:
                break
            swept += self._store.sweeper.sweep(every_s, [self._left.pop()])
        if swept.num_files:
            log.info("blob store swept files=%d bytes=%d", swept.num_files, swept.num_bytes)
