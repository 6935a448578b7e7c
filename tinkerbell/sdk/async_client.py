"""The asynchronous client: the verbs of `Client`, awaited."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from tinkerbell import wire
from tinkerbell.sdk import calls, sse, transport
from tinkerbell.sdk.adapter import checkpoint_id
from tinkerbell.sdk.archive import unpack
from tinkerbell.sdk.async_adapter import AsyncAdapter
from tinkerbell.sdk.async_future import AsyncFuture
from tinkerbell.sdk.calls import Call
from tinkerbell.sdk.retry import Attempts, RetryPolicy
from tinkerbell.sdk.settings import Sampling
from tinkerbell.sdk.tokenizer import Tokenizer, load_tokenizer
from tinkerbell.types import ModelInfo

T = TypeVar("T")
R = TypeVar("R")


class AsyncClient:
    """A connection to a Tinkerbell server, for one event loop. Arguments and behaviour as of `Client`."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        transport_: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retry = retry or RetryPolicy()
        self._http = httpx.AsyncClient(
            base_url=transport.base_url(base_url),
            headers=transport.headers(api_key),
            limits=transport.LIMITS,
            transport=transport_,
        )
        self._tokenizer: Tokenizer | None = None

    async def add_lora(
        self,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        targets: Sequence[str] | str | None = None,
        seed: int | None = None,
        name: str | None = None,
        base_model: str | None = None,
        checkpoint: str | wire.Checkpoint | wire.SaveResult | None = None,
        with_optimizer: bool = True,
        wait: bool = True,
    ) -> AsyncAdapter:
        """A new adapter: fresh (rank, alpha, targets, seed; what is left out takes LoraConfig's defaults),
        or from a checkpoint, which has its own shape.

        Waits until the server has it and raises RequestFailed if the model cannot have such an adapter.
        Without `wait` the handle comes at once; its requests are carried out once the adapter is there, or
        fail.
        """
        call = calls.add_lora(
            rank=rank,
            alpha=alpha,
            targets=targets,
            seed=seed,
            name=name,
            base_model=base_model,
            checkpoint=None if checkpoint is None else checkpoint_id(checkpoint),
            with_optimizer=with_optimizer,
        )
        future = AsyncFuture[wire.AddLoraResult](self, await self.do(call), wire.AddLoraResult)
        if wait:
            await future.result()
        assert future.state.adapter_id is not None, "an add_lora names its adapter"
        return AsyncAdapter(self, future.state.adapter_id)

    async def adapter(self, id: str) -> AsyncAdapter:
        """The handle of an adapter that exists. Raises NotFound."""
        return AsyncAdapter(self, (await self.do(calls.adapter(id))).id)

    async def adapters(self) -> list[wire.Adapter]:
        """Your adapters."""
        return await self._all(calls.adapters)

    async def sample(self, prompt: Sequence[int] | str, **settings: Unpack[Sampling]) -> AsyncFuture[wire.SampleResult]:
        """Continue a prompt with the base model."""
        state = await self.do(calls.sample(None, await self.encode(prompt), settings))
        return AsyncFuture[wire.SampleResult](self, state, wire.SampleResult)

    async def future(self, id: int) -> AsyncFuture[Any]:
        """A future of yours by its id, in this or another program. Raises NotFound."""
        return AsyncFuture[Any](self, await self.do(calls.future(id, 0.0)), object)

    async def gather(self, *futures: AsyncFuture[R], timeout: float | None = None) -> list[R]:
        """The results of all, in the order given; raises what the first failed one raises."""
        until = None if timeout is None else time.monotonic() + timeout
        return [
            await future.result(None if until is None else max(0.0, until - time.monotonic())) for future in futures
        ]

    async def checkpoints(self, adapter: str | None = None) -> list[wire.Checkpoint]:
        """Your checkpoints, or those of one adapter."""
        return await self._all(partial(calls.checkpoints, adapter))

    async def download_checkpoint(
        self,
        checkpoint: str | wire.Checkpoint | wire.SaveResult,
        path: str | Path,
        *,
        with_optimizer: bool = False,
    ) -> Path:
        """Write a checkpoint's files into the directory `path`, which PEFT's `from_pretrained` takes as it is. What its
        base model is called on another machine, and how one on the head is merged:
        docs/how-to/take-an-adapter-away.md.

        Adam's moments are in it only with `with_optimizer`.
        """
        content = await self._send(calls.download(checkpoint_id(checkpoint), with_optimizer))
        return await asyncio.to_thread(unpack, content, Path(path))

    async def runs(self) -> list[wire.Run]:
        """The history of each of your adapters, without its points."""
        return await self._all(calls.runs)

    async def usage(self, *, all_tenants: bool = False) -> list[wire.UsageRow]:
        """What you used, by adapter and kind of request; everybody's with an admin key."""
        return await self._all(partial(calls.usage, all_tenants))

    async def limits(self) -> wire.Quotas:
        """What you have of everything that is limited, and what you may have."""
        return await self.do(calls.limits())

    async def queue(self, *, all_tenants: bool = False) -> wire.Queue:
        """What waits and what was served lately: your own line, or every tenant's with an admin key."""
        return await self.do(calls.queue(all_tenants))

    async def models(self) -> list[ModelInfo]:
        """What is served."""
        return await self.do(calls.models())

    async def tokenizer(self) -> Tokenizer:
        """The served model's tokenizer, loaded here by transformers. Raises MissingPackage without it."""
        if self._tokenizer is None:
            self._tokenizer = await asyncio.to_thread(load_tokenizer, await self.models())
        return self._tokenizer

    async def encode(self, prompt: Sequence[int] | str) -> Sequence[int]:
        """Token ids of a text as it stands, no special tokens added; token ids as they are."""
        if not isinstance(prompt, str):
            return prompt
        return (await self.tokenizer()).encode(prompt, add_special_tokens=False)

    async def events(self, after: int | None = None) -> AsyncIterator[wire.LogEvent]:
        """Your log from position `after` on (None: from now), and then live, without end: break out of it
        when you have seen enough. Goes on by itself, without gap or repetition, when the connection or the
        server is lost."""
        attempts = self._attempts(calls.events(after))
        while True:
            parser, call = sse.Parser(), calls.events(after)
            try:
                async with self._http.stream(
                    call.method, call.path, headers=call.headers, timeout=transport.timeout(call.wait_s)
                ) as response:
                    wait = attempts.after_answer(response, b"" if response.is_success else await response.aread())
                    if wait is None:
                        async for text in response.aiter_text():
                            for message in parser.feed(text):
                                event = calls.event(message)
                                after = event.position
                                yield event
                            if after is None and parser.id:
                                # The server says first where the stream begins.
                                after = int(parser.id)
            except httpx.TransportError as exc:
                wait = attempts.after_loss(exc)
            # A server that stops ends its streams in good order; it may be back in a moment.
            await asyncio.sleep(self._retry.first_delay_s if wait is None else wait)

    async def do(self, call: Call[T], until: float | None = None) -> T:
        """Send a call until it is answered, as the retry policy says.

        Raises TimeoutError when there is no answer at `until`, by time.monotonic().
        """
        return call.decode(await self._send(call, until))

    async def _all(self, page: Callable[[T | None], Call[list[T]]]) -> list[T]:
        items: list[T] = []
        while True:
            found = await self.do(page(items[-1] if items else None))
            items += found
            if len(found) < calls.PAGE:
                return items

    async def _send(self, call: Call[Any], until: float | None = None) -> bytes:
        attempts = self._attempts(call, until)
        while True:
            try:
                response = await self._http.send(transport.request(self._http, call, until))
            except httpx.TransportError as exc:
                await asyncio.sleep(attempts.after_loss(exc))
                continue
            wait = attempts.after_answer(response, response.content)
            if wait is None:
                return response.content
            await asyncio.sleep(wait)

    def _attempts(self, call: Call[Any], until: float | None = None) -> Attempts:
        return Attempts(self._retry, f"{call.what} at {self._http.base_url}", until=until)

    async def close(self) -> None:
        """Close the connections. Futures stay what they are on the server."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
