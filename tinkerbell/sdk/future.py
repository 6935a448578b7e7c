"""A request that was accepted and will be answered: what the sync client hands out."""

import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tinkerbell import wire
from tinkerbell.errors import ServerError
from tinkerbell.sdk import calls
from tinkerbell.sdk.errors import request_failed

if TYPE_CHECKING:
    from tinkerbell.sdk.client import Client

R = TypeVar("R", covariant=True)


def result_of(state: wire.Future, kind: type[R]) -> R:
    """The result of an answered future. Raises RequestFailed if it failed."""
    if state.error is not None:
        raise request_failed(state.id, state.error)
    if not isinstance(state.result, kind):
        raise ServerError(f"future {state.id} ({state.kind}) came back as {type(state.result).__name__}")
    return state.result


class Future(Generic[R]):
    """Result of one request. The request is in the server's log already: losing this object loses nothing,
    `client.future(id)` gives it again."""

    def __init__(self, client: "Client", state: wire.Future, kind: type[Any]) -> None:
        self._client = client
        self._state = state
        self._kind = kind

    @property
    def id(self) -> int:
        """Position of the request in the server's log."""
        return self._state.id

    @property
    def state(self) -> wire.Future:
        """What the server said of it last; asks nothing."""
        return self._state

    def done(self) -> bool:
        """Whether it has been answered, well or badly. Asks the server once if that is not known yet."""
        return self._look(0.0).state != "pending"

    def result(self, timeout: float | None = None) -> R:
        """Wait for the answer, at most `timeout` seconds (None: as long as it takes).

        Raises RequestFailed if the request failed, TimeoutError if it is still pending (it stays so: ask
        again).
        """
        give_up_at = None if timeout is None else time.monotonic() + timeout
        while True:
            left = calls.LONG_POLL_S if give_up_at is None else give_up_at - time.monotonic()
            if self._look(max(0.0, min(left, calls.LONG_POLL_S))).state != "pending":
                result: R = result_of(self._state, self._kind)
                return result
            if give_up_at is not None and time.monotonic() >= give_up_at:
                raise TimeoutError(f"future {self.id} ({self._state.kind}) is still pending after {timeout} s")

    def _look(self, wait_s: float) -> wire.Future:
        if self._state.state == "pending":
            self._state = self._client.do(calls.future(self.id, wait_s))
        return self._state

    def __repr__(self) -> str:
        return f"<Future {self.id} {self._state.kind} {self._state.state}>"
