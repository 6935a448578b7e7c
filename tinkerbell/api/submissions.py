"""From a valid wire body to a committed request event and its pending future.

One thread hop holds everything that may touch the database or loop over tokens; the commit itself is the
store's group commit.
"""

import asyncio
import base64
import hashlib
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec

from tinkerbell import wire
from tinkerbell.api import admission, validation, views
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.errors import InvalidRequest, NotFound, Unavailable
from tinkerbell.events import kinds
from tinkerbell.events.rows import CheckpointRow
from tinkerbell.types import AdapterId, LoraConfig, ModelInfo

RECENT_S = 60.0
"""Window of the speed that Retry-After is estimated from."""

_LIVING = ("pending", "ready")

Accepted = asyncio.Future[list[kinds.Recorded]]
"""Done when the event is committed."""


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who submits, and what identifies the request."""

    principal: Principal
    correlation: str
    idempotency_key: str | None
    raw: bytes
    """The body as it was sent."""


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """A request event that only lacks its envelope."""

    event: kinds.AnyRequest
    tokens: int = 0
    body: kinds.Body | None = None
    expected_seq: int | None = None


class Submitter:
    """Submits one caller's requests."""

    def __init__(self, context: Context, caller: Caller) -> None:
        self._context = context
        self._caller = caller
        self._tenant = caller.principal.tenant

    async def add_lora(self, body: wire.AddLora) -> wire.Future:
        """A new adapter, pending until an executor holds it."""

        def draft(model: ModelInfo) -> Draft:
            if body.base_model is not None and body.base_model != model.name:
                raise InvalidRequest(f"base_model: this server serves {model.name!r}, not {body.base_model!r}.")
            lora, checkpoint = body.lora or LoraConfig(), None
            if body.checkpoint is not None:
                if body.lora is not None:
                    raise InvalidRequest("lora: leave it out with a checkpoint, which has its own.")
                checkpoint = self._checkpoint(body.checkpoint)
                lora = checkpoint.lora
            validation.lora(lora, model)
            queries = self._context.store.queries
            living = sum(row.state in _LIVING for row in queries.adapters(self._tenant))
            admission.check_adapters(self._limits(), living)
            return Draft(
                event=kinds.AddLoraRequested(
                    base_model=model.name,
                    lora=lora,
                    seed=secrets.randbits(63) if body.seed is None else body.seed,
                    name=body.name,
                    checkpoint=body.checkpoint,
                    with_optimizer=checkpoint is not None and body.with_optimizer,
                )
            )

        return await self._submit("add_lora", new_id("ad"), draft, path_id=None)

    async def remove_lora(self, adapter: AdapterId) -> wire.Future:
        """The adapter leaves after what was asked before."""
        return await self._for_adapter("remove_lora", adapter, lambda _: Draft(event=kinds.RemoveLoraRequested()))

    async def forward(self, adapter: AdapterId, body: wire.ForwardBackward) -> wire.Future:
        """Loss and logprobs only."""
        return await self._for_adapter(
            "forward", adapter, lambda model: self._train(kinds.ForwardRequested, body, model)
        )

    async def forward_backward(self, adapter: AdapterId, body: wire.ForwardBackward) -> wire.Future:
        """Loss, logprobs and gradients."""
        return await self._for_adapter(
            "forward_backward",
            adapter,
            lambda model: self._train(kinds.ForwardBackwardRequested, body, model),
        )

    async def optim_step(self, adapter: AdapterId, body: wire.OptimStep) -> wire.Future:
        """Apply the accumulated gradient."""
        draft = Draft(event=kinds.OptimStepRequested(adam=body.adam), expected_seq=body.seq)
        return await self._for_adapter("optim_step", adapter, lambda _: draft)

    async def sample(self, adapter: AdapterId | None, body: wire.Sample) -> wire.Future:
        """Continue a prompt with an adapter, or with the base model."""

        def draft(model: ModelInfo) -> Draft:
            prompt = validation.prompt(body, model, self._context.settings.limits.max_request_tokens)
            num_tokens = len(body.prompt)
            return Draft(
                event=kinds.SampleRequested(params=body.params, num_tokens=num_tokens),
                body=kinds.SampleBody(prompt),
                tokens=num_tokens,
            )

        if adapter is None:
            return await self._submit("sample", None, draft, path_id=None)
        return await self._for_adapter("sample", adapter, draft)

    async def save(self, adapter: AdapterId, body: wire.Save) -> wire.Future:
        """Keep the adapter as a checkpoint."""
        event = kinds.SaveRequested(checkpoint=new_id("ck"), name=body.name)
        return await self._for_adapter("save", adapter, lambda _: Draft(event=event, expected_seq=body.seq))

    async def load(self, adapter: AdapterId, body: wire.Load) -> wire.Future:
        """Put a checkpoint in the adapter's place."""

        def draft(_: ModelInfo) -> Draft:
            checkpoint = self._checkpoint(body.checkpoint)
            row = self._context.store.queries.adapter(self._tenant, adapter)
            if row is None:
                raise validation.no_adapter(adapter)
            if checkpoint.lora != row.lora:
                raise InvalidRequest(
                    f"checkpoint: {body.checkpoint} has {_shape(checkpoint.lora)}, the adapter {_shape(row.lora)};"
                    " start a new adapter from the checkpoint instead."
                )
            event = kinds.LoadRequested(checkpoint=body.checkpoint, with_optimizer=body.with_optimizer)
            return Draft(event=event, expected_seq=body.seq)

        return await self._for_adapter("load", adapter, draft)

    # ---- the common path ------------------------------------------------------------------------------------

    async def _for_adapter(self, kind: str, adapter: AdapterId, draft: Callable[[ModelInfo], Draft]) -> wire.Future:
        return await self._submit(kind, validation.adapter_id(adapter), draft, path_id=adapter)

    async def _submit(
        self,
        kind: str,
        adapter: AdapterId | None,
        draft: Callable[[ModelInfo], Draft],
        *,
        path_id: AdapterId | None,
    ) -> wire.Future:
        context, caller = self._context, self._caller
        if (failure := context.failure()) is not None:
            raise Unavailable(
                f"The scheduler has stopped ({type(failure).__name__}); see the server's log.",
                retry_after_s=10.0,
            )

        loop = asyncio.get_running_loop()

        def prepare() -> tuple[Accepted, int, int]:
            made = draft(context.model())
            new = self._envelope(kind, adapter, made, path_id)
            held_requests, held_tokens = context.in_flight.hold(self._tenant, made.tokens)
            try:
                place = self._admit(made.tokens, held_requests, held_tokens)
                return context.store.submit_from(loop, new), made.tokens, place
            except BaseException:
                context.in_flight.release(self._tenant, made.tokens)
                raise

        preparing = asyncio.ensure_future(asyncio.to_thread(prepare))
        try:
            accepted, tokens, place = await asyncio.shield(preparing)
        except asyncio.CancelledError:
            # The caller is gone, the thread goes on: what it will hold must not be held for ever.
            preparing.add_done_callback(self._abandon)
            raise
        try:
            (recorded,) = await accepted
        except NotFound as error:
            raise (validation.no_adapter(path_id) if path_id is not None else error) from error
        finally:
            context.in_flight.release(self._tenant, tokens)
        # An idempotent replay gives the first event back, whose place in the line is not this one.
        first = recorded.correlation == caller.correlation
        return views.submitted(recorded, place if first else None)

    def _abandon(self, prepared: "asyncio.Future[tuple[Accepted, int, int]]") -> None:
        """Let go of what was held for a request that nobody waits for any more, once it is written or refused."""
        if prepared.cancelled() or prepared.exception() is not None:
            return
        accepted, tokens, _ = prepared.result()
        accepted.add_done_callback(lambda done: done.cancelled() or done.exception())
        accepted.add_done_callback(lambda _: self._context.in_flight.release(self._tenant, tokens))

    def _envelope(self, kind: str, adapter: AdapterId | None, made: Draft, path_id: AdapterId | None) -> kinds.NewEvent:
        caller = self._caller
        return kinds.NewEvent(
            event=made.event,
            body=made.body,
            tenant=self._tenant,
            stream=f"tenant/{self._tenant}" if adapter is None else f"adapter/{adapter}",
            adapter=adapter,
            correlation=caller.correlation,
            actor=caller.principal.key_id,
            idempotency_key=caller.idempotency_key,
            request_hash=request_hash(kind, path_id, caller.raw) if caller.idempotency_key is not None else None,
            expected_seq=made.expected_seq,
        )

    def _train(
        self,
        event: type[kinds.ForwardRequested] | type[kinds.ForwardBackwardRequested],
        body: wire.ForwardBackward,
        model: ModelInfo,
    ) -> Draft:
        data = validation.data(body.data, body.loss, model, self._context.settings.limits.max_request_tokens)
        num_tokens = sum(datum.num_tokens for datum in data)
        return Draft(
            event=event(
                loss=body.loss,
                num_datums=len(data),
                num_tokens=num_tokens,
                chunk_tokens=self._context.settings.chunk_tokens,
            ),
            body=kinds.ForwardBackwardBody(data),
            tokens=num_tokens,
            expected_seq=body.seq,
        )

    def _checkpoint(self, text: str) -> CheckpointRow:
        row = self._context.store.queries.checkpoint(self._tenant, validation.checkpoint_id(text))
        if row is None or row.kind != "save":
            raise validation.no_checkpoint(text)
        return row

    def _limits(self) -> admission.TenantLimits:
        row = self._context.tenant(self._tenant)
        return admission.limits_of(
            self._context.settings.limits,
            max_requests=row.max_pending_requests,
            max_tokens=row.max_pending_tokens,
            max_adapters=row.max_adapters,
        )

    def _admit(self, tokens: int, held_requests: int, held_tokens: int) -> int:
        """The place in the tenant's line. Raises TooManyRequests or TooLarge."""
        queries = self._context.store.queries
        limits = self._limits()
        requests, pending_tokens = queries.pending_count(self._tenant)
        line = admission.Line(requests=requests + held_requests, tokens=pending_tokens + held_tokens)
        if not admission.fits(limits, line, tokens):
            since_us = time.time_ns() // 1000 - int(RECENT_S * 1e6)
            _, recent_tokens = queries.recent_usage(since_us, self._tenant).get(self._tenant, (0, 0))
            moving = msgspec.structs.replace(line, tokens_per_s=recent_tokens / RECENT_S)
            raise admission.refuse(limits, moving, tokens)
        return line.requests


def _shape(lora: LoraConfig) -> str:
    return f"rank {lora.rank}, alpha {lora.alpha:g} and targets {', '.join(lora.targets)}"


def new_id(prefix: str) -> str:
    """`ad_` or `ck_` and 100 random bits in lower-case base32."""
    return f"{prefix}_{base64.b32encode(secrets.token_bytes(13)).decode().lower()[:20]}"


def request_hash(kind: str, path_id: AdapterId | None, raw: bytes) -> bytes:
    """sha256 over the kind of request, the adapter named by the caller, and the body in canonical JSON.

    The body as the caller sent it, so that neither generated ids nor a new release's defaults change it. The
    adapter of an alias's body counts as the path's: both ways to ask are one request.
    """
    body: Any = msgspec.json.decode(raw) if raw else {}
    if isinstance(body, dict):
        body.pop("adapter_id", None)
    canonical = msgspec.json.encode([kind, path_id, body], order="deterministic")
    return hashlib.sha256(canonical).digest()
