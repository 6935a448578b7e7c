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


def wait_s(until: float | None) -> float:
    """How long the next long poll may wait, for an answer that is wanted until then."""
    return calls.LONG_POLL_S if until is None else max(0.0, min(until - time.monotonic(), calls.LONG_POLL_S))


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

        Raises RequestFailed if the request failed, TimeoutError if it is still pending or the server does not answer
        (it stays as it is: ask again).
        """
        until = None if timeout is None else time.monotonic() + timeout
        try:
            while self._look(wait_s(until), until).state == "pending":
                if until is not None and time.monotonic() >= until:
                    raise TimeoutError("it is pending")
        except TimeoutError as exc:
            raise TimeoutError(f"future {self.id} ({self._state.kind}): no answer after {timeout} s") from exc
        result: R = result_of(self._state, self._kind)
        return result

    def _look(self, wait_s: float, until: float | None = None) -> wire.Future:
        if self._state.state == "pending":
            self._state = self._client.do(calls.future(self.id, wait_s), until)
        return self._state

    def __repr__(self) -> str:
        return f"<Future {self.id} {self._state.kind} {self._state.state}>"
