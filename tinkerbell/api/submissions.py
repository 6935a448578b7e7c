"""From a valid wire body to a committed request event and its pending future.

One thread hop holds everything that may touch the database or loop over tokens; the commit itself is the
store's group commit.
"""

import asyncio
import base64
import secrets
import time
from collections.abc import Callable

import msgspec

from tinkerbell import wire
from tinkerbell.api import admission, idempotency, validation, views
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context, Held
from tinkerbell.errors import InvalidRequest, NotFound, Unavailable, UserError
from tinkerbell.events import kinds
from tinkerbell.events.rows import CheckpointRow
from tinkerbell.types import AdapterId, LoraConfig, ModelInfo

RECENT_S = 60.0
"""Window of the speed that Retry-After is estimated from."""

_LIVING = ("pending", "ready")

Accepted = asyncio.Future[list[kinds.Recorded]]
"""Done when the event is committed."""
Prepared = tuple[Accepted, Held, int] | kinds.Recorded
"""What is on its way, what it holds and its place in the line; or the request that had its idempotency key before."""


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
    adapters: int = 0
    """New ones."""
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
            return Draft(
                adapters=1,
                event=kinds.AddLoraRequested(
                    base_model=model.name,
                    lora=lora,
                    seed=secrets.randbits(63) if body.seed is None else body.seed,
                    name=body.name,
                    checkpoint=body.checkpoint,
                    with_optimizer=checkpoint is not None and body.with_optimizer,
                ),
            )

        return await self._submit("add_lora", new_id("ad"), draft, path_id=None)

    async def remove_lora(self, adapter: AdapterId) -> wire.Future:
        """The adapter leaves after what was asked before."""
        return await self._for_adapter("remove_lora", adapter, lambda _: Draft(event=kinds.RemoveLoraRequested()))

    async def forward(self, adapter: AdapterId, body: wire.Forward) -> wire.Future:
        """Loss, logprobs and outputs only."""

        def draft(model: ModelInfo) -> Draft:
            made = self._train(kinds.ForwardRequested, body, model)
            if body.outputs is None:
                return made
            limits = self._context.settings.limits
            validation.outputs(body.outputs, made.tokens, model, limits.max_output_bytes)
            return msgspec.structs.replace(made, event=msgspec.structs.replace(made.event, outputs=body.outputs))

        return await self._for_adapter("forward", adapter, draft)

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

        def prepare() -> Prepared:
            keyed = caller.idempotency_key is not None
            hashed = idempotency.request_hash(kind, path_id, caller.raw) if keyed else None
            try:
                made = draft(context.model())
                held = Held(1, made.tokens, made.adapters)
                before = context.in_flight.hold(self._tenant, held)
                try:
                    place = self._admit(made, before)
                    accepted = context.store.submit_from(loop, self._envelope(adapter, made, hashed))
                except BaseException:
                    context.in_flight.release(self._tenant, held)
                    raise
            except UserError:
                # A request whose first answer was lost has its place, whatever would be said to a new one.
                known = idempotency.find(context.store, self._tenant, caller.idempotency_key, hashed)
                if known is not None:
                    return known
                raise
            return accepted, held, place

        preparing = asyncio.ensure_future(asyncio.to_thread(prepare))
        try:
            prepared = await asyncio.shield(preparing)
        except asyncio.CancelledError:
            # The caller is gone, the thread goes on: what it will hold must not be held for ever.
            preparing.add_done_callback(self._abandon)
            raise
        if isinstance(prepared, kinds.Recorded):
            return views.submitted(prepared, None)
        accepted, held, place = prepared
        try:
            (recorded,) = await accepted
        except NotFound as error:
            raise (validation.no_adapter(path_id) if path_id is not None else error) from error
        finally:
            context.in_flight.release(self._tenant, held)
        # An idempotent replay gives the first event back, whose place in the line is not this one.
        first = recorded.correlation == caller.correlation
        return views.submitted(recorded, place if first else None)

    def _abandon(self, preparing: "asyncio.Future[Prepared]") -> None:
        """Let go of what was held for a request that nobody waits for any more, once it is written or refused."""
        if preparing.cancelled() or preparing.exception() is not None:
            return
        prepared = preparing.result()
        if isinstance(prepared, kinds.Recorded):
            return
        accepted, held, _ = prepared

        def let_go(done: Accepted) -> None:
            if not done.cancelled():
                done.exception()  # nobody else will look at it
            self._context.in_flight.release(self._tenant, held)

        accepted.add_done_callback(let_go)

    def _envelope(self, adapter: AdapterId | None, made: Draft, hashed: bytes | None) -> kinds.NewEvent:
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
            request_hash=hashed,
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

    def _admit(self, made: Draft, held: Held) -> int:
        """The place in the tenant's line behind what is held already. Raises TooManyRequests, TooLarge, Conflict."""
        queries, tokens = self._context.store.queries, made.tokens
        limits = self._limits()
        if made.adapters:
            living = sum(row.state in _LIVING for row in queries.adapters(self._tenant))
            admission.check_adapters(limits, living + held.adapters)
        requests, pending_tokens = queries.pending_count(self._tenant)
        line = admission.Line(requests=requests + held.requests, tokens=pending_tokens + held.tokens)
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
