"""The synchronous client: one object a program, usable from all its threads."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from tinkerbell import wire
from tinkerbell.sdk import calls, sse, transport
from tinkerbell.sdk.adapter import Adapter, checkpoint_id
from tinkerbell.sdk.archive import unpack
from tinkerbell.sdk.calls import Call
from tinkerbell.sdk.future import Future
from tinkerbell.sdk.retry import Attempts, RetryPolicy
from tinkerbell.sdk.settings import Sampling
from tinkerbell.sdk.tokenizer import Tokenizer, load_tokenizer
from tinkerbell.types import ModelInfo

T = TypeVar("T")
R = TypeVar("R")


class Client:
    """A connection to a Tinkerbell server.

    `base_url` and `api_key` default to TINKERBELL_URL and TINKERBELL_API_KEY, and to a server without keys
    on this machine. Lost connections and full queues are ridden out as `retry` says; nothing is ever done
    twice by it.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        transport_: httpx.BaseTransport | None = None,
    ) -> None:
        self._retry = retry or RetryPolicy()
        self._http = httpx.Client(
            base_url=transport.base_url(base_url),
            headers=transport.headers(api_key),
            limits=transport.LIMITS,
            transport=transport_,
        )
        self._tokenizer: Tokenizer | None = None

    def add_lora(
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
    ) -> Adapter:
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
        future = Future[wire.AddLoraResult](self, self.do(call), wire.AddLoraResult)
        if wait:
            future.result()
        assert future.state.adapter_id is not None, "an add_lora names its adapter"
        return Adapter(self, future.state.adapter_id)

    def adapter(self, id: str) -> Adapter:
        """The handle of an adapter that exists. Raises NotFound."""
        return Adapter(self, self.do(calls.adapter(id)).id)

    def adapters(self) -> list[wire.Adapter]:
        """Your adapters."""
        return self._all(calls.adapters)

    def sample(self, prompt: Sequence[int] | str, **settings: Unpack[Sampling]) -> Future[wire.SampleResult]:
        """Continue a prompt with the base model."""
        state = self.do(calls.sample(None, self.encode(prompt), settings))
        return Future[wire.SampleResult](self, state, wire.SampleResult)

    def future(self, id: int) -> Future[Any]:
        """A future of yours by its id, in this or another program. Raises NotFound."""
        return Future[Any](self, self.do(calls.future(id, 0.0)), object)

    def gather(self, *futures: Future[R], timeout: float | None = None) -> list[R]:
        """The results of all, in the order given; raises what the first failed one raises."""
        give_up_at = None if timeout is None else time.monotonic() + timeout
        return [
            future.result(None if give_up_at is None else max(0.0, give_up_at - time.monotonic())) for future in futures
        ]

    def checkpoints(self, adapter: str | None = None) -> list[wire.Checkpoint]:
        """Your checkpoints, or those of one adapter."""
        return self._all(partial(calls.checkpoints, adapter))

    def download_checkpoint(
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
        content = self._send(calls.download(checkpoint_id(checkpoint), with_optimizer))
        return unpack(content, Path(path))

    def runs(self) -> list[wire.Run]:
        """The history of each of your adapters, without its points."""
        return self._all(calls.runs)

    def usage(self, *, all_tenants: bool = False) -> list[wire.UsageRow]:
        """What you used, by adapter and kind of request; everybody's with an admin key."""
        return self._all(partial(calls.usage, all_tenants))

    def limits(self) -> wire.Quotas:
        """What you have of everything that is limited, and what you may have."""
        return self.do(calls.limits())

    def queue(self, *, all_tenants: bool = False) -> wire.Queue:
        """What waits and what was served lately: your own line, or every tenant's with an admin key."""
        return self.do(calls.queue(all_tenants))

    def models(self) -> list[ModelInfo]:
        """What is served."""
        return self.do(calls.models())

    def tokenizer(self) -> Tokenizer:
        """The served model's tokenizer, loaded here by transformers. Raises MissingPackage without it."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.models())
        return self._tokenizer

    def encode(self, prompt: Sequence[int] | str) -> Sequence[int]:
        """Token ids of a text as it stands, no special tokens added; token ids as they are."""
        return self.tokenizer().encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt

    def events(self, after: int | None = None) -> Iterator[wire.LogEvent]:
        """Your log from position `after` on (None: from now), and then live, without end: break out of it
        when you have seen enough. Goes on by itself, without gap or repetition, when the connection or the
        server is lost."""
        attempts = self._attempts(calls.events(after))
        while True:
            parser, call = sse.Parser(), calls.events(after)
            try:
                with self._http.stream(
                    call.method, call.path, headers=call.headers, timeout=transport.timeout(call.wait_s)
                ) as response:
                    content = b"" if response.is_success else response.read()
                    wait = attempts.after_answer(response, content)
                    for text in response.iter_text() if wait is None else ():
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
            time.sleep(self._retry.first_delay_s if wait is None else wait)

    def do(self, call: Call[T], until: float | None = None) -> T:
        """Send a call until it is answered, as the retry policy says.

        Raises TimeoutError when there is no answer at `until`, by time.monotonic().
        """
        return call.decode(self._send(call, until))

    def _all(self, page: Callable[[T | None], Call[list[T]]]) -> list[T]:
        items: list[T] = []
        while True:
            found = self.do(page(items[-1] if items else None))
            items += found
            if len(found) < calls.PAGE:
                return items

    def _send(self, call: Call[Any], until: float | None = None) -> bytes:
        attempts = self._attempts(call, until)
        while True:
            try:
                response = self._http.send(transport.request(self._http, call, until))
            except httpx.TransportError as exc:
                time.sleep(attempts.after_loss(exc))
                continue
            wait = attempts.after_answer(response, response.content)
            if wait is None:
                return response.content
            time.sleep(wait)

    def _attempts(self, call: Call[Any], until: float | None = None) -> Attempts:
        return Attempts(self._retry, f"{call.what} at {self._http.base_url}", until=until)

    def close(self) -> None:
        """Close the connections. Futures stay what they are on the server."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
