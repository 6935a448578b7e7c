"""A request that was accepted and will be answered: what the async client hands out."""

import asyncio
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tinkerbell import wire
from tinkerbell.sdk import calls
from tinkerbell.sdk.future import result_of, wait_s
from tinkerbell.sdk.transport import SHORTEST_S

if TYPE_CHECKING:
    from tinkerbell.sdk.async_client import AsyncClient

R = TypeVar("R", covariant=True)


class AsyncFuture(Generic[R]):
    """Result of one request: `await future`, as often as you like. The request is in the server's log
    already."""

    def __init__(self, client: "AsyncClient", state: wire.Future, kind: type[Any]) -> None:
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

    async def done(self) -> bool:
        """Whether it has been answered, well or badly. Asks the server once if that is not known yet."""
        return (await self._look(0.0)).state != "pending"

    async def result(self, timeout: float | None = None) -> R:
        """Wait for the answer, at most `timeout` seconds (None: as long as it takes).

        Raises RequestFailed if the request failed, TimeoutError if it is still pending (it stays so: ask
        again).
        """
        until = None if timeout is None else time.monotonic() + timeout
        try:
            # Also where the transport keeps no time.
            async with asyncio.timeout(None if timeout is None else max(timeout, SHORTEST_S)):
                while (await self._look(wait_s(until), until)).state == "pending":
                    if until is not None and time.monotonic() >= until:
                        raise TimeoutError("it is pending")
        except TimeoutError as exc:
            raise TimeoutError(f"future {self.id} ({self._state.kind}): no answer after {timeout} s") from exc
        result: R = result_of(self._state, self._kind)
        return result

    def __await__(self) -> Generator[Any, None, R]:
        return self.result().__await__()

    async def _look(self, wait_s: float, until: float | None = None) -> wire.Future:
        if self._state.state == "pending":
            self._state = await self._client.do(calls.future(self.id, wait_s), until)
        return self._state

    def __repr__(self) -> str:
        return f"<AsyncFuture {self.id} {self._state.kind} {self._state.state}>"
