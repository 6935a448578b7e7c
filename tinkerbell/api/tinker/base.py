"""What every submission of the tinker protocol needs: whose things are there, events besides requests, retries."""

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import msgspec

from tinkerbell.api import validation
from tinkerbell.api.context import Context
from tinkerbell.api.submitting import Caller, Draft, Submitting, require_lasting
from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker import names
from tinkerbell.errors import InvalidRequest, NotFound, SessionOver, shown
from tinkerbell.events import kinds
from tinkerbell.events.names import SavedName
from tinkerbell.events.queries import Queries
from tinkerbell.events.rows import CheckpointRow, FutureRow, SamplerRow, SessionRow
from tinkerbell.types import AdapterId, ModelInfo, SessionId, TenantId

P = ParamSpec("P")
T = TypeVar("T")

SEED_BITS = (1 << 63) - 1

PROJECT = "default"
"""What every tenant may call the one project that it has."""


def served_names(model: ModelInfo) -> tuple[str, ...]:
    """How a client may call the served model: first the name that gives it the tokenizer."""
    return tuple(dict.fromkeys(name for name in (model.tokenizer, model.name) if name))


def base_model(model: ModelInfo) -> str:
    """What clients are told: `AutoTokenizer.from_pretrained` takes it."""
    return served_names(model)[0]


def named_by(queries: Queries, tenant: TenantId, path: names.Path) -> CheckpointRow:
    """The checkpoint that has the path or had it last, deleted and expired ones too. Raises NotFound."""
    row = queries.saved(tenant, path.model, path.use, path.name)
    if row is None:
        # Saved without a name, through /v1 or for one sampler.
        found = queries.checkpoint(tenant, path.name)
        fits = found is not None and (found.kind, found.adapter, found.use) == ("save", path.model, path.use)
        row = found if fits else None
    if row is None:
        raise names.no_path(path)
    return row


def usable_at(queries: Queries, tenant: TenantId, path: names.Path) -> CheckpointRow:
    """The checkpoint that the path names. Raises NotFound."""
    row = named_by(queries, tenant, path)
    if not row.is_usable(time.time_ns() // 1000):
        raise names.no_path(path)
    return row


class TinkerSubmitting(Submitting):
    """Submits one caller's request, known by what the SDK numbers it with."""

    def __init__(self, context: Context, caller: Caller) -> None:
        super().__init__(context, caller)
        self._queries = context.store.queries

    # ---- what is there ---------------------------------------------------------------------------------------------

    def session(self, text: str) -> SessionRow:
        """Raises NotFound."""
        row = self._queries.session(self._tenant, names.session_id(text))
        if row is None:
            raise names.no_session(text)
        return row

    def sampler(self, text: str) -> SamplerRow:
        """Raises NotFound."""
        row = self._queries.sampler(self._tenant, text)
        if row is None:
            raise names.no_sampler(text)
        return row

    def request(self, text: str) -> FutureRow:
        """Raises NotFound."""
        row = self._queries.future(self._tenant, names.request_position(text))
        if row is None:
            raise names.no_request(text)
        return row

    def _living_session(self, text: str) -> SessionRow:
        """As of now; an event's `session` holds when it is written, too. Raises NotFound, SessionOver."""
        row = self.session(text)
        if row.ended_us is not None:
            raise SessionOver(f"The session {shown(text)} has ended; start another one.")
        return row

    def _at_path(self, text: str) -> CheckpointRow:
        row = usable_at(self._queries, self._tenant, names.parse_path(text))
        require_lasting(row)
        return row

    # ---- the common path -------------------------------------------------------------------------------------------

    async def _for_model(
        self, kind: str, model_id: AdapterId, draft: Callable[[ModelInfo], Draft], asked: bytes | None = None
    ) -> m.Submitted:
        try:
            recorded, _ = await self.submit(kind, validation.adapter_id(model_id), draft, path_id=model_id, asked=asked)
        except NotFound as exc:
            raise await self._context.read(self._tenant, self._explained, exc, model_id) from exc
        return m.Submitted(request_id=str(recorded.position), model_id=model_id)

    def _explained(self, exc: NotFound, model_id: AdapterId) -> NotFound:
        """Why a model is not there (any more)."""
        session = self._queries.session(self._tenant, names.session_of(model_id))
        if session is None or session.ended_us is None:
            return exc
        return NotFound(
            f"The session of {model_id} has ended, and its models with it; go on from a checkpoint in another session."
        )

    async def _prepared(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a call on the way into the log gives, which may block."""
        return await self._context.threads.submits.run(self._tenant, call, *args, **kwargs)

    async def _write(self, *events: kinds.NewEvent) -> kinds.Recorded:
        """The last of them, which enter together."""
        loop = asyncio.get_running_loop()
        return (await (await self._prepared(self._context.store.submit_from, loop, *events)))[-1]

    def _event(
        self, event: kinds.AnyEvent, key: str | None, session: SessionId | None = None, asked: str = ""
    ) -> kinds.NewEvent:
        """One of the tenant's own stream; `key` makes it happen once, to those who `asked` the same; `session` must
        not have ended."""
        return kinds.NewEvent(
            event=event,
            tenant=self._tenant,
            stream=f"tenant/{self._tenant}",
            correlation=self._caller.correlation,
            actor=self._caller.principal.key_id,
            idempotency_key=key,
            request_hash=None if key is None else hashlib.sha256(f"{key}{asked}".encode()).digest(),
            session=session,
        )

    def _sampler_event(self, made: kinds.SamplerCreated, asked: str) -> kinds.NewEvent:
        return self._event(made, f"tinker:{made.sampler}", made.session, f" of {asked}")

    def _adapter_of(self, sampler: SamplerRow, model: ModelInfo) -> tuple[kinds.NewEvent, ...]:
        """What makes the adapter that holds a sampler's weights, where it is not there yet."""
        assert sampler.checkpoint is not None
        checkpoint = self._queries.checkpoint(self._tenant, sampler.checkpoint)
        if checkpoint is None:
            raise InvalidRequest(f"The weights of {sampler.id} are not saved (yet); wait for save_weights_for_sampler.")
        if not checkpoint.is_usable(time.time_ns() // 1000):
            raise InvalidRequest(
                f"The weights of {sampler.id} were deleted, or have expired. Those of a sampler without a name go when"
                " newer ones were made and nobody used them for some time; save them under a name to keep them."
            )
        if self._queries.adapter(self._tenant, sampler.id) is not None:
            return ()
        self.require_base(checkpoint.adapter, f"the sampler {sampler.id}")
        event = kinds.AddLoraRequested(
            base_model=model.name,
            base_hash=model.hash,
            lora=checkpoint.lora,
            seed=seed_of(sampler.id),
            checkpoint=checkpoint.id,
        )
        made = self._event(event, f"tinker:adapter:{sampler.id}", sampler.session)
        return (msgspec.structs.replace(made, stream=f"adapter/{sampler.id}", adapter=sampler.id),)

    def _save(
        self,
        path: names.Path,
        seq: int,
        ttl_s: int | None,
        user_metadata: dict[str, str] | None,
        *,
        overwrite: bool = False,
    ) -> kinds.SaveRequested:
        return kinds.SaveRequested(
            checkpoint=names.checkpoint_id(path.model, seq),
            name=path.name,
            use=path.use,
            ttl_s=ttl_s,
            user_metadata=user_metadata or {},
            replaces=self.holders(SavedName(*path)) if overwrite else (),
        )

    def _request_hash(self, kind: str, path_id: AdapterId | None) -> bytes:
        digest = hashlib.sha256(f"{kind}\0{path_id}\0".encode())
        digest.update(self._caller.raw)
        return digest.digest()


def check_base_model(name: str, model: ModelInfo) -> None:
    if name not in served_names(model):
        raise InvalidRequest(f"base_model: this server serves {' or '.join(served_names(model))}, not {shown(name)}.")


def check_optimizer(name: str) -> None:
    if name != "adamw":
        raise InvalidRequest(f"optimizer_config: {shown(name)} is not served; adamw is.")


def check_project(name: str, tenant: TenantId) -> None:
    if name not in (PROJECT, tenant):
        raise InvalidRequest(
            f"There is no project {shown(name)}; you have one, which is called '{tenant}' or '{PROJECT}'."
        )


def check_loadable(checkpoint: CheckpointRow, optimizer: bool) -> None:
    if optimizer and "optimizer" not in checkpoint.blobs:
        raise InvalidRequest("This checkpoint has no optimizer state; load it without, or save with save_state.")


def seed_of(id: str) -> int:
    """Where the caller gives none: the same for a retry."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "little") & SEED_BITS
