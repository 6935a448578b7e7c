"""Which adapters the executor process holds, and how far each is past its last recovery point."""

import time
from dataclasses import dataclass, field

from tinkerbell.types import AdapterId, TenantId


@dataclass(slots=True)
class Resident:
    """One adapter in the executor's memory."""

    tenant: TenantId
    adapter: AdapterId
    num_parameters: int
    step: int
    state_digest: str
    boundary_seq: int
    """`seq` of the last request that changed weights or Adam moments. Gradients accumulated since are no part
    of a snapshot, so a snapshot holds the effect of requests up to here."""
    boundary_position: int
    """Position of that request."""
    steps_ahead: int = 0
    """Optimizer steps that no checkpoint holds which is written."""
    ahead_since_s: float | None = None
    """When the first of them was seen, by the event loop's clock."""
    state_bytes: int = 0
    """Of its last snapshot; 0 before the first."""
    point_on_its_way: bool = False
    """A recovery point of it is being written."""
    failed_points: int = 0
    """In a row."""
    resting_until_s: float = 0.0
    """No other point before then, by the event loop's clock."""
    used_s: float = field(default_factory=time.monotonic)
    """When it was last in a batch."""

    def stepped(self, seq: int, position: int, step: int, state_digest: str) -> None:
        """It took an optimizer step."""
        self.boundary_seq, self.boundary_position = seq, position
        self.step, self.state_digest = step, state_digest
        self.steps_ahead += 1

    def saved(self, steps: int) -> None:
        """A recovery point that has so many of the steps ahead was written."""
        self.steps_ahead -= steps
        self.ahead_since_s = None
        self.failed_points = 0

    @property
    def num_weight_bytes(self) -> int:
        """Of its weights in memory, four bytes each."""
        return 4 * self.num_parameters

    @property
    def num_bytes(self) -> int:
        """Of a snapshot, as far as one can say before it is taken: weights and two moments of four bytes each."""
        return self.state_bytes or 12 * self.num_parameters


class Residency:
    """The executor's adapters. Empty after every start of its process."""

    def __init__(self) -> None:
        self._residents: dict[AdapterId, Resident] = {}

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._residents

    def __getitem__(self, adapter: AdapterId) -> Resident:
        return self._residents[adapter]

    def __len__(self) -> int:
        return len(self._residents)

    def put(self, resident: Resident) -> None:
        self._residents[resident.adapter] = resident

    def use(self, adapter: AdapterId | None) -> None:
        """It is in a batch now."""
        if adapter in self._residents:
            resident = self._residents[adapter] = self._residents.pop(adapter)
            resident.used_s = time.monotonic()

    def by_use(self) -> list[Resident]:
        """Those used longest ago first."""
        return list(self._residents.values())

    def forget(self, adapter: AdapterId) -> None:
        self._residents.pop(adapter, None)

    def clear(self) -> None:
        self._residents.clear()

    def num_parameters(self, adapter: AdapterId | None) -> int:
        """0 where it is not known."""
        resident = self._residents.get(adapter or "")
        return resident.num_parameters if resident else 0

    def step(self, adapter: AdapterId | None) -> int:
        """Optimizer steps of an adapter that is here; 0 for the base model."""
        return self._residents[adapter].step if adapter is not None else 0

    def moved(self) -> list[Resident]:
        """Adapters with steps that no checkpoint holds."""
        return [resident for resident in self._residents.values() if resident.steps_ahead]
