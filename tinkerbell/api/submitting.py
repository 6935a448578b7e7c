"""From a valid request to a committed request event and its pending future.

One thread hop holds everything that may touch the database or loop over tokens; the commit itself is the
store's group commit.
"""

import asyncio
import base64
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from tinkerbell.api import admission, bodies, idempotency, validation
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context, Held
from tinkerbell.errors import InvalidRequest, NameTaken, NotFound, TooManyRequests, Unavailable, UserError
from tinkerbell.events import kinds, quotas
from tinkerbell.events.base_models import base_model_of, require_same
from tinkerbell.events.names import SavedName, living
from tinkerbell.events.rows import CheckpointRow
from tinkerbell.types import AdapterId, CheckpointId, ModelInfo, SessionId, is_sampler

RECENT_S = 60.0
"""Window of the speed that Retry-After is estimated from."""

_OF_SAMPLERS = ("sample", "remove_lora")
"""Kinds of requests to the adapter of a sampler."""

MAX_SAVES_AT_ONCE = 32
"""Under one name."""
SAVE_RETRY_S = 1.0

OVERWRITES = 8
"""Times that a save which overwrites is asked, while others save under the same name at once."""

T = TypeVar("T")

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
    hashed: bytes | None = None
    """`bodies.request_hash` of it, where it is known already."""


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """A request event that only lacks its envelope."""

    before: tuple[kinds.NewEvent, ...] = ()
    """What is written right before it, or not without it."""

    event: kinds.AnyRequest
    body: kinds.Body | None = None
    expected_seq: int | None = None
    session: SessionId | None = None
    """It must not have ended."""


class Submitting:
    """Submits one caller's requests."""

    def __init__(self, context: Context, caller: Caller) -> None:
        self._context = context
        self._caller = caller
        self._tenant = caller.principal.tenant

    async def submit(
        self,
        kind: str,
        adapter: AdapterId | None,
        draft: Callable[[ModelInfo], Draft],
        *,
        path_id: AdapterId | None,
        asked: bytes | None = None,
    ) -> tuple[kinds.Recorded, int | None]:
        """The committed request, and its place in the tenant's line if it is new. `path_id`: the adapter as the caller
        named it; `asked`: hash of the request, where it is not that of its whole body. `draft` may block.

        Raises what `draft` raises, NotFound, Conflict, IdempotencyConflict, TooManyRequests, TooLarge, Unavailable.
        """
        context, caller = self._context, self._caller
        if adapter is not None and is_sampler(adapter) and kind not in _OF_SAMPLERS:
            raise InvalidRequest(
                f"{kind}: {path_id} holds a sampler's weights, which nothing changes; it can be sampled from, and"
                " removed. Train a model, and make another sampler of it."
            )
        if (failure := context.failure()) is not None:
            raise Unavailable(
                f"The server cannot go on ({type(failure).__name__}); see its log.",
                retry_after_s=10.0,
            )

        loop = asyncio.get_running_loop()

        def prepare() -> Prepared:
            keyed = caller.idempotency_key is not None
            hashed = (asked or self._request_hash(kind, path_id)) if keyed else None
            try:
                model = context.model()
                made = _sized(draft(model), model)
                held = Held(1, quotas.reserved_tokens(made.event))
                before = context.in_flight.hold(self._tenant, held)
                try:
                    place = self._admit(held.tokens, before)
                    request = self._envelope(adapter, made, hashed)
                    accepted = context.store.submit_from(loop, *made.before, request)
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

        preparing = asyncio.ensure_future(context.threads.submits.run(self._tenant, prepare))
        try:
            prepared = await asyncio.shield(preparing)
        except asyncio.CancelledError:
            # The caller is gone, the thread goes on: what it will hold must not be held for ever.
            preparing.add_done_callback(self._abandon)
            raise
        if isinstance(prepared, kinds.Recorded):
            return prepared, None
        accepted, held, place = prepared
        try:
            recorded = (await accepted)[-1]
        except NotFound as error:
            raise (validation.no_adapter(path_id) if path_id is not None else error) from error
        finally:
            context.in_flight.release(self._tenant, held)
        # An idempotent replay gives the first event back, whose place in the line is not this one.
        first = recorded.correlation == caller.correlation
        return recorded, place if first else None

    def _request_hash(self, kind: str, path_id: AdapterId | None) -> bytes:
        """What the caller asked, for its idempotency key."""
        caller = self._caller
        if caller.hashed is not None:
            return caller.hashed
        return bodies.request_hash(kind, path_id, caller.raw, self._context.settings.limits.max_body_elements)

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
            session=made.session,
        )

    def holders(self, name: SavedName) -> tuple[CheckpointId, ...]:
        """What a save that overwrites replaces. Raises TooManyRequests where many of the kind are under way: each names
        all before it."""
        found = self._context.store.queries.name_holders(name)
        if sum(not holder.saved for holder in found.values()) >= MAX_SAVES_AT_ONCE:
            raise TooManyRequests(
                f"{MAX_SAVES_AT_ONCE} saves under the name {name.name!r} are under way; wait for one.",
                retry_after_s=SAVE_RETRY_S,
            )
        return tuple(sorted(living(found, time.time_ns() // 1000)))

    async def save_named(self, save: Callable[[], Awaitable[T]], *, overwrite: bool) -> T:
        """What a save gives; one that overwrites is asked again where another one took the name since its draft.

        Raises NameTaken besides.
        """
        for _ in range(OVERWRITES if overwrite else 0):
            with contextlib.suppress(NameTaken):
                return await save()
        return await save()

    def usable_checkpoint(self, text: str) -> CheckpointRow:
        """A checkpoint that the tenant saved and may still use. Raises NotFound."""
        row = self._context.store.queries.checkpoint(self._tenant, validation.checkpoint_id(text))
        if row is None or row.kind != "save" or not row.is_usable(time.time_ns() // 1000):
            raise validation.no_checkpoint(text)
        require_lasting(row)
        return row

    def require_base(self, adapter: AdapterId, what: str) -> None:
        """Raise OtherBaseModel where the adapter, or `what` was saved of it, belongs to a model that is not served. The
        scheduler asks again: by then another one may be."""
        queries = self._context.store.queries
        trained_on, environment = queries.base_model(self._tenant, adapter), queries.environment()
        if trained_on is not None and environment is not None:
            require_same(what, trained_on, base_model_of(environment))

    def _admit(self, tokens: int, held: Held) -> int:
        """The place in the tenant's line behind what is held already. Raises TooManyRequests, TooLarge.

        An early word, with advice when to come back; what counts is said where the request is written.
        """
        context, queries = self._context, self._context.store.queries
        row = context.tenant(self._tenant)
        own = {name: getattr(row, f"max_{name}") for name in quotas.NAMES}
        limits = quotas.limits_of(context.settings.limits, own)
        requests, pending_tokens = queries.pending_count(self._tenant)
        line = admission.Line(requests=requests + held.requests, tokens=pending_tokens + held.tokens)
        if not admission.fits(limits, line, tokens):
            since_us = time.time_ns() // 1000 - int(RECENT_S * 1e6)
            _, recent_tokens = queries.recent_usage(since_us, [self._tenant]).get(self._tenant, (0, 0))
            moving = msgspec.structs.replace(line, tokens_per_s=recent_tokens / RECENT_S)
            raise admission.refuse(limits, moving, tokens)
        return line.requests


def _sized(made: Draft, model: ModelInfo) -> Draft:
    """New adapters say how large they are: by the model, which the log does not know."""

    def size(event: kinds.AnyEvent) -> Any:
        if not isinstance(event, kinds.AddLoraRequested):
            return event
        return msgspec.structs.replace(event, num_parameters=validation.num_parameters(event.lora, model))

    before = tuple(msgspec.structs.replace(new, event=size(new.event)) for new in made.before)
    return msgspec.structs.replace(made, event=size(made.event), before=before)


def require_lasting(row: CheckpointRow) -> None:
    """Raise InvalidRequest for weights that were saved for one sampler: they go when it does."""
    if row.use == "sampler" and row.name is None:
        raise InvalidRequest(
            f"{row.id} was saved without a name for one sampler, and goes with it; save it under a name to use it"
            " elsewhere."
        )


def new_id(prefix: str) -> str:
    """`ad_` or `ck_` and 100 random bits in lower-case base32."""
    return f"{prefix}_{base64.b32encode(secrets.token_bytes(13)).decode().lower()[:20]}"
