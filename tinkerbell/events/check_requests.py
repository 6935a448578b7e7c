"""Part of the check: requests, their answers, order, fences and costs (I4, I6, I7, I9, I10)."""

from typing import NoReturn

from sqlalchemy import RowMapping

from tinkerbell.errors import Corrupt
from tinkerbell.events import kinds
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.projections import Cause, cause_of


class Requests:
    """Follows the log event by event."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.num_results = 0
        self.cost_us = 0
        self._pending: dict[int, Cause] = {}
        self._answered: set[int] = set()
        self._next_seq: dict[str, int] = {}
        self._done_seq: dict[str, int] = {}
        self._epochs: dict[str, int] = {}
        self._keys: set[tuple[str, str]] = set()
        self._charged: dict[int, int] = {}
        """Request -> charges so far, less its cost once it is answered; nothing may stay."""

    def see(self, row: RowMapping, recorded: Recorded) -> Cause | None:
        """Check the next event. Returns the request it answers, if it does."""
        self._check_key(row)
        self._check_fence(row)
        match recorded.event:
            case event if kinds.is_request(event):
                self._request(recorded)
            case event if kinds.is_result(event):
                return self._result(recorded, event)
            case kinds.LeaseGranted() as granted:
                if granted.epoch != self._epochs.get(granted.resource, 0) + 1:
                    _refuse("I10", recorded, f"epoch {granted.epoch} of {granted.resource} is not the next")
                self._epochs[granted.resource] = granted.epoch
            case kinds.Unreadable(type_="lease.granted"):
                # Epochs go up by one, and a lease has a stream of its own.
                resource = recorded.stream.removeprefix("system/")
                self._epochs[resource] = self._epochs.get(resource, 0) + 1
            case kinds.BatchRan() as ran:
                if sum(charge for _, charge in ran.charges) != ran.busy_us:
                    _refuse("I6", recorded, f"the charges of batch {ran.batch} do not sum to {ran.busy_us} us")
                for request, charge in ran.charges:
                    self._charge(request, charge)
            case _:
                pass
        return None

    def end(self) -> None:
        """Check what holds only when all is seen."""
        for request, rest in self._charged.items():
            if request not in self._pending and rest:
                raise Corrupt(
                    f"I6 at position {request}: its cost and its charges differ by {rest} us",
                    invariant="I6",
                    position=request,
                )

    def _check_key(self, row: RowMapping) -> None:
        if row["idempotency_key"] is None:
            return
        key = (row["tenant"], row["idempotency_key"])
        if row["request_hash"] is None or key in self._keys:
            raise Corrupt(
                f"I9 at position {row['position']}: its idempotency key has no hash or was used before",
                invariant="I9",
                position=row["position"],
            )
        self._keys.add(key)

    def _check_fence(self, row: RowMapping) -> None:
        resource, epoch = row["fence_resource"], row["fence_epoch"]
        if resource is not None and epoch != self._epochs.get(resource):
            raise Corrupt(
                f"I10 at position {row['position']}: epoch {epoch} of {resource} did not hold then",
                invariant="I10",
                position=row["position"],
            )

    def _request(self, recorded: Recorded) -> None:
        self.num_requests += 1
        self._pending[recorded.position] = cause_of(recorded)
        sequenced = recorded.adapter is not None and kinds.kind_of(recorded.event) not in kinds.SAMPLE_KINDS
        expected = self._next_seq.get(recorded.adapter or "", 0) if sequenced else None
        if recorded.seq != expected:
            _refuse("I7", recorded, f"its seq is {recorded.seq}, the next one is {expected}")
        if recorded.adapter is not None and expected is not None:
            self._next_seq[recorded.adapter] = expected + 1

    def _result(self, recorded: Recorded, result: kinds.Event) -> Cause:
        self.num_results += 1
        cause = self._pending.pop(recorded.causation or 0, None)
        if cause is None or recorded.causation is None:
            twice = recorded.causation in self._answered
            _refuse("I4", recorded, f"request {recorded.causation} {'has a result' if twice else 'is not there'}")
        same = (recorded.tenant, recorded.adapter) == (cause.tenant, cause.adapter)
        if not same or not kinds.answers(result, cause.kind):
            _refuse("I4", recorded, f"it answers request {recorded.causation}, which is another's")
        self._answered.add(recorded.causation)
        if cause.seq is not None and cause.adapter is not None:
            if cause.seq != self._done_seq.get(cause.adapter, -1) + 1:
                _refuse("I7", recorded, f"it answers seq {cause.seq} before an earlier one")
            self._done_seq[cause.adapter] = cause.seq
        # What one that cannot be read says it cost is taken from the batches that ran it.
        cost_us = result.cost_us if isinstance(result, kinds.Result) else self._charged.get(recorded.causation, 0)
        self.cost_us += cost_us
        self._charge(recorded.causation, -cost_us)
        return cause

    def _charge(self, request: int, charge: int) -> None:
        self._charged[request] = self._charged.get(request, 0) + charge
        if not self._charged[request]:
            del self._charged[request]


def _refuse(invariant: str, recorded: Recorded, why: str) -> NoReturn:
    raise Corrupt(
        f"{invariant} at position {recorded.position}: {why}", invariant=invariant, position=recorded.position
    )
