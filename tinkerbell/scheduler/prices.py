"""What the next unit of a request is estimated to take, by the cost model and the size of its adapter."""

from tinkerbell.scheduler.cost import CostModel, features, in_turn
from tinkerbell.scheduler.pending import PendingRequest
from tinkerbell.scheduler.residency import Residency


class Prices:
    """Both are `batching.Price`."""

    def __init__(self, cost: CostModel, residency: Residency) -> None:
        self._cost = cost
        self._residency = residency

    def price(self, request: PendingRequest, chunk: int) -> int:
        """Microseconds, at least 1: what its tenant's share is charged at once."""
        return self._cost.estimate_us(features(request, chunk, self._residency.num_parameters(request.adapter)))

    def lasts(self, request: PendingRequest, chunk: int) -> int:
        """Microseconds, at least 1, that it makes its batch longer."""
        needed = features(request, chunk, self._residency.num_parameters(request.adapter))
        return self._cost.estimate_us(in_turn(needed))
