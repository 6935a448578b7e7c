"""Where adapters lie: those in use, and others while there is room, on the device; the rest in the host's memory."""

from collections.abc import Iterable

import torch

from tinkerbell.executors.hf.adapter import Adapter
from tinkerbell.types import AdapterId

HOST = torch.device("cpu")

DEVICE_SHARE = 0.25
"""Of a CUDA device's memory that idle adapters may take unless told otherwise."""


class Adapters(dict[AdapterId, Adapter]):
    """The executor's adapters by id. On a CPU the host is the device, and nothing ever moves.

    Moving changes no bit of an adapter. Copies between a CUDA device and pinned host memory have never been run.
    """

    def __init__(self, device: torch.device, budget_bytes: int | None = None) -> None:
        """`budget_bytes`: for adapters on the device; None: DEVICE_SHARE of a CUDA device, no bound elsewhere."""
        super().__init__()
        self._device = device
        if budget_bytes is None and device.type == "cuda":
            budget_bytes = int(torch.cuda.get_device_properties(device).total_memory * DEVICE_SHARE)
        self._budget_bytes = budget_bytes
        self._by_use: dict[AdapterId, None] = {}
        """Those used longest ago first."""

    def bring(self, wanted: Iterable[AdapterId]) -> None:
        """Have these on the device together, whatever they take; others leave it, the longest unused first, until the
        budget holds or none is left."""
        wanted = [adapter for adapter in dict.fromkeys(wanted) if adapter in self]
        for adapter in wanted:
            self._by_use.pop(adapter, None)
            self._by_use[adapter] = None
        if self._budget_bytes is not None:
            self._make_room(set(wanted), self._budget_bytes)
            for adapter in wanted:
                self[adapter].move(self._device)

    def _make_room(self, wanted: set[AdapterId], budget_bytes: int) -> None:
        total = sum(a.num_bytes for name, a in self.items() if name in wanted or a.device == self._device)
        for name in [name for name in self._by_use if name not in self]:
            del self._by_use[name]
        # One that was never used has not been asked for since it was made.
        unused = [name for name in self if name not in self._by_use]
        for name in [*unused, *self._by_use]:
            if total <= budget_bytes:
                return
            adapter = self[name]
            if name not in wanted and adapter.device == self._device:
                adapter.move(HOST)
                total -= adapter.num_bytes
