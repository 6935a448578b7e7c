"""One adapter of yours on a server, for asyncio programs."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from tinkerbell import wire
from tinkerbell.sdk import calls
from tinkerbell.sdk.adapter import checkpoint_id
from tinkerbell.sdk.async_future import AsyncFuture
from tinkerbell.sdk.calls import Call
from tinkerbell.sdk.settings import Adam, Outputs, Sampling

if TYPE_CHECKING:
    from tinkerbell.sdk.async_client import AsyncClient

R = TypeVar("R")


class AsyncAdapter:
    """As `Adapter`; awaiting a call waits until the request is in the server's log, awaiting the
    AsyncFuture it gives waits for the answer. Tasks may share a handle; their calls are accepted in the
    order they were awaited."""

    def __init__(self, client: "AsyncClient", id: str) -> None:
        self._client = client
        self.id = id
        self._turn = asyncio.Lock()

    async def forward_backward(
        self,
        data: Sequence[wire.DatumBody],
        loss: str = "cross_entropy",
        config: Mapping[str, float] | None = None,
        num_targets: int = 1,
    ) -> AsyncFuture[wire.ForwardBackwardResult]:
        """Add the gradient of the loss, summed over all tokens of `data`, to the adapter's."""
        call = calls.forward_backward(self.id, data, loss, config, num_targets)
        return await self._ask(call, wire.ForwardBackwardResult)

    async def forward(
        self,
        data: Sequence[wire.DatumBody],
        loss: str = "cross_entropy",
        config: Mapping[str, float] | None = None,
        num_targets: int = 1,
        **outputs: Unpack[Outputs],
    ) -> AsyncFuture[wire.ForwardBackwardResult]:
        """Loss and logprobs, no gradient; and what `outputs` asks for, as in Adapter.forward."""
        call = calls.forward(self.id, data, loss, config, num_targets, outputs)
        return await self._ask(call, wire.ForwardBackwardResult)

    async def optim_step(self, **settings: Unpack[Adam]) -> AsyncFuture[wire.OptimStepResult]:
        """Apply the accumulated gradient with AdamW, and clear it."""
        return await self._ask(calls.optim_step(self.id, settings), wire.OptimStepResult)

    async def sample(self, prompt: Sequence[int] | str, **settings: Unpack[Sampling]) -> AsyncFuture[wire.SampleResult]:
        """Continue a prompt with the weights this adapter has after the calls made before."""
        call = calls.sample(self.id, await self._client.encode(prompt), settings)
        return await self._ask(call, wire.SampleResult)

    async def save(self, name: str | None = None, *, overwrite: bool = False) -> AsyncFuture[wire.SaveResult]:
        """Keep weights and optimizer as a checkpoint. A name is the adapter's only one, unless it may `overwrite`."""
        return await self._ask(calls.save(self.id, name, overwrite), wire.SaveResult)

    async def load(
        self, checkpoint: str | wire.Checkpoint | wire.SaveResult, with_optimizer: bool = True
    ) -> AsyncFuture[wire.LoadResult]:
        """Put a checkpoint in the adapter's place; without the optimizer its moments and step count start
        anew."""
        return await self._ask(calls.load(self.id, checkpoint_id(checkpoint), with_optimizer), wire.LoadResult)

    async def remove(self) -> AsyncFuture[wire.RemoveLoraResult]:
        """Drop the adapter from the server's memory, after what was asked before. Its checkpoints stay."""
        return await self._ask(calls.remove_lora(self.id), wire.RemoveLoraResult)

    async def info(self) -> wire.Adapter:
        """What the server knows of it now."""
        return await self._client.do(calls.adapter(self.id))

    async def run(self, after_step: int = 0) -> wire.Run:
        """Its history: one point for each optimizer step after `after_step`, the first 1000 of them."""
        return await self._client.do(calls.run(self.id, after_step))

    async def checkpoints(self) -> list[wire.Checkpoint]:
        """Its checkpoints, oldest first."""
        return await self._client.checkpoints(self.id)

    async def _ask(self, call: Call[wire.Future], kind: type[R]) -> AsyncFuture[R]:
        async with self._turn:
            return AsyncFuture[Any](self._client, await self._client.do(call), kind)

    def __repr__(self) -> str:
        return f"<AsyncAdapter {self.id}>"
