"""Saving, loading, copying and changing checkpoints, as the tinker protocol asks for it."""

from collections.abc import Callable, Sequence

import msgspec

from tinkerbell.api import bodies, idempotency, validation
from tinkerbell.api.submitting import Draft, new_id
from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker import names
from tinkerbell.api.tinker.base import (
    TinkerSubmitting,
    check_base_model,
    check_loadable,
    check_optimizer,
    check_project,
    seed_of,
    usable_at,
)
from tinkerbell.errors import InvalidRequest, NameTaken, UserError, shown
from tinkerbell.events import kinds
from tinkerbell.events.rows import CheckpointRow
from tinkerbell.types import AdapterId, ModelInfo

RENUMBERED = ("sampling_session_seq_id",)
"""Of a save for a sampler: the SDK takes another number each time that it sends the same request again."""


class CheckpointSubmitting(TinkerSubmitting):
    """Submits what concerns checkpoints."""

    async def load_as_new(self, body: m.LoadWeights) -> m.Submitted:
        """A new adapter that begins as a checkpoint."""
        if body.session_id is None or body.model_seq_id is None:
            raise InvalidRequest("load_weights needs model_id and seq_id, or session_id and model_seq_id.")
        session = names.session_id(body.session_id)
        model_id = names.model_id(session, body.model_seq_id)

        def draft(model: ModelInfo) -> Draft:
            self._living_session(session)
            if body.base_model is not None:
                check_base_model(body.base_model, model)
            check_optimizer(body.optimizer_config.type)
            checkpoint = self._at_path(body.path)
            check_loadable(checkpoint, body.optimizer)
            self.require_base(checkpoint.adapter, body.path)
            event = kinds.AddLoraRequested(
                base_model=model.name,
                base_hash=model.hash,
                lora=checkpoint.lora,
                seed=seed_of(model_id),
                checkpoint=checkpoint.id,
                with_optimizer=body.optimizer,
                user_metadata=body.user_metadata or {},
            )
            return Draft(event=event, session=session)

        return await self._for_model("add_lora", model_id, draft)

    async def load_into(self, model_id: AdapterId, body: m.LoadWeights) -> m.Submitted:
        """A checkpoint in the adapter's place."""

        def draft(_: ModelInfo) -> Draft:
            checkpoint = self._at_path(body.path)
            check_loadable(checkpoint, body.optimizer)
            row = self._queries.adapter(self._tenant, model_id)
            if row is None:
                raise validation.no_adapter(model_id)
            self.require_base(model_id, f"the model {model_id}")
            self.require_base(checkpoint.adapter, body.path)
            if row.lora != checkpoint.lora:
                raise InvalidRequest(
                    f"{body.path} is of another shape than the model: make a new one from it"
                    " (create_training_client_from_state)."
                )
            return Draft(event=kinds.LoadRequested(checkpoint=checkpoint.id, with_optimizer=body.optimizer))

        return await self._for_model("load", model_id, draft)

    async def save(self, body: m.SaveWeights, *, external: bool) -> m.Submitted:
        """A checkpoint to train on, or to be taken away."""
        if body.age_encryption_recipients:
            raise InvalidRequest("age_encryption_recipients: checkpoints are not encrypted for others here.")
        path = names.Path(body.model_id, "external" if external else "state", names.checkpoint_name(body.path))

        def draft(_: ModelInfo) -> Draft:
            ttl_s, overwrite = body.ttl_seconds, body.overwrite
            return Draft(event=self._save(path, body.seq_id, ttl_s, body.user_metadata, overwrite=overwrite))

        return await self._save_at(path, draft, overwrite=body.overwrite)

    async def save_for_sampler(self, body: m.SaveWeightsForSampler) -> m.Submitted:
        """A checkpoint to sample from; without a name for one sampling session, which is made with it. A retry gives
        the sampling session of the first time, whatever number it comes with."""
        if body.kind != "snapshot":
            raise InvalidRequest(
                f"kind: {shown(body.kind)} is not served; a sampler keeps the weights it was made with."
            )
        if body.path is not None:
            path = names.Path(body.model_id, "sampler", names.checkpoint_name(body.path))

            def named(_: ModelInfo) -> Draft:
                return Draft(event=self._save(path, body.seq_id, body.ttl_seconds, body.user_metadata))

            return await self._save_at(path, named, overwrite=False)
        if body.sampling_session_seq_id is None:
            raise InvalidRequest("save_weights_for_sampler needs path or sampling_session_seq_id.")
        session = names.session_of(body.model_id)
        sampler = names.sampler_id(session, body.sampling_session_seq_id)

        def unnamed(_: ModelInfo) -> Draft:
            self._living_session(session)
            checkpoint = names.checkpoint_id(body.model_id, body.seq_id)
            event = kinds.SaveRequested(
                checkpoint=checkpoint,
                use="sampler",
                ttl_s=body.ttl_seconds,
                user_metadata=body.user_metadata or {},
                sampler=sampler,
            )
            made = kinds.SamplerCreated(sampler=sampler, session=session, checkpoint=checkpoint)
            return Draft(event=event, before=(self._sampler_event(made, checkpoint),))

        max_elements = self._context.settings.limits.max_body_elements
        asked = bodies.request_hash("save", body.model_id, self._caller.raw, max_elements, RENUMBERED)
        return await self._for_model("save", body.model_id, unnamed, asked)

    async def _save_at(self, path: names.Path, draft: Callable[[ModelInfo], Draft], *, overwrite: bool) -> m.Submitted:
        try:
            return await self.save_named(lambda: self._for_model("save", path.model, draft), overwrite=overwrite)
        except NameTaken as exc:
            raise InvalidRequest(
                f"There is a checkpoint {path} already, or it is being saved; give another name"
                + (", or overwrite=True." if path.use == "state" else ".")
            ) from exc

    async def copy_weights(self, body: m.CopyWeights, client: str) -> names.Path:
        """A checkpoint once more, of the same kind and with the same bytes, in a new run that cannot be trained. Its
        retry gives the same one."""
        key = self._caller.idempotency_key
        max_elements = self._context.settings.limits.max_body_elements
        hashed = None if key is None else bodies.request_hash("copy_weights", None, self._caller.raw, max_elements)

        def made() -> kinds.Recorded | tuple[kinds.NewEvent, ...]:
            try:
                return self._copies(body, client, hashed)
            except UserError:
                # A copy whose first answer was lost is there, whatever became of its source.
                known = idempotency.find(self._context.store, self._tenant, key, hashed)
                if known is None:
                    raise
                return known

        found = await self._prepared(made)
        recorded = found if isinstance(found, kinds.Recorded) else await self._write(*found)
        assert isinstance(recorded.event, kinds.CheckpointCopied) and recorded.adapter is not None
        return names.Path(recorded.adapter, recorded.event.use, recorded.event.name)

    def _copies(self, body: m.CopyWeights, client: str, hashed: bytes | None) -> tuple[kinds.NewEvent, ...]:
        if body.destination_project_id is not None:
            check_project(body.destination_project_id, self._tenant)
        key = self._caller.idempotency_key
        before: tuple[kinds.NewEvent, ...] = ()
        living = None
        if body.session_id is not None and body.model_seq_id is not None:
            living = self._living_session(body.session_id).id
            run = names.model_id(living, body.model_seq_id)
            if self._queries.adapter(self._tenant, run) is not None:
                raise InvalidRequest(f"model_seq_id: there is a model {run} already; give a number that is free.")
        elif body.session_id is None and body.model_seq_id is None and body.destination_project_id is not None:
            started = kinds.SessionStarted(session=names.new_session(), client=client)
            run = names.model_id(started.session, 0)
            before = (self._event(started, key and f"{key}:session"),)
        else:
            raise InvalidRequest("copy_weights needs destination_project_id, or session_id and model_seq_id.")
        # Also one that goes with its sampler: the copy stays.
        source = usable_at(self._queries, self._tenant, names.parse_path(body.source_path))
        self._context.store.require_blobs(source.blobs.values())
        saved_of = self._queries.adapter(self._tenant, source.adapter)
        assert saved_of is not None
        copied = kinds.CheckpointCopied(
            checkpoint=new_id("ck"),
            source=source.id,
            name=source.name or source.id,
            use=source.use,
            base_model=saved_of.base_model,
            base_hash=saved_of.base_hash or "",
            seed=saved_of.seed,
            step=source.step,
            lora=source.lora,
            num_bytes=source.num_bytes,
            state_digest=source.state_digest,
            ttl_s=body.ttl_seconds,
            user_metadata=source.user_metadata,
        )
        event = msgspec.structs.replace(
            self._event(copied, key, living),
            stream=f"adapter/{run}",
            adapter=run,
            shared=source.blobs,
            request_hash=hashed,
        )
        return (*before, event)

    async def change_checkpoint(
        self,
        row: CheckpointRow,
        *,
        published: bool | None = None,
        expires_us: int | msgspec.UnsetType | None = msgspec.UNSET,
    ) -> None:
        """What is not given stays as it is. Its retry, also after other changes, changes nothing."""
        changed = kinds.CheckpointChanged(
            checkpoint=row.id,
            expires_us=row.expires_us if isinstance(expires_us, msgspec.UnsetType) else expires_us,
            published=row.published if published is None else published,
        )
        await self._write(self._event(changed, self._caller.idempotency_key))

    async def delete_checkpoints(self, rows: Sequence[CheckpointRow]) -> None:
        """Together. A retry, also after others were saved under their name, deletes nothing."""
        changes = [
            kinds.CheckpointChanged(checkpoint=row.id, expires_us=row.expires_us, published=row.published, deleted=True)
            for row in rows
        ]
        if changes:
            *first, last = changes
            key = self._caller.idempotency_key
            await self._write(*(self._event(change, None) for change in first), self._event(last, key))
