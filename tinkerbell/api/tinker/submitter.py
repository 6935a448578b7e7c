"""What the tinker protocol can be asked to do, as the request events of `/v1`.

A request is known by what the SDK numbers it with (model and seq_id, session and model_seq_id, ...), so that a retry
gives the request of the first time. Requests run in the order in which they arrive: the SDK sends a model's one after
another, but for the chunks of one forward_backward, whose gradients add in any order.
"""

import asyncio
import time

import msgspec
from litestar.exceptions import HTTPException

from tinkerbell.api import idempotency, validation
from tinkerbell.api.submitting import Draft, new_id
from tinkerbell.api.tinker import codec, names, sampling
from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker import wire_pb2 as pb
from tinkerbell.api.tinker.base import (
    SEED_BITS,
    TinkerSubmitting,
    check_base_model,
    check_loadable,
    check_optimizer,
    check_project,
    seed_of,
)
from tinkerbell.errors import InvalidRequest, UserError
from tinkerbell.events import kinds
from tinkerbell.events.rows import CheckpointRow
from tinkerbell.events.sessions import ending
from tinkerbell.types import (
    AdamParams,
    AdapterId,
    LoraConfig,
    ModelInfo,
    SamplerId,
    SessionId,
)

SIGNS_OF_LIFE = 8
"""How many of a session are written down, at most, in the time after which its silence would end it."""

ALPHA = 32.0
"""Of every adapter made here: the protocol has no word for it."""


class TinkerSubmitter(TinkerSubmitting):
    """Submits one caller's request."""

    async def create_model(self, body: m.CreateModel) -> m.Submitted:
        """A new adapter with the id `<session>:train:<n>`."""
        self._require_small()
        model_id = names.model_id(names.session_id(body.session_id), body.model_seq_id)

        def draft(model: ModelInfo) -> Draft:
            self._living_session(body.session_id)
            check_base_model(body.base_model, model)
            check_optimizer(body.optimizer_config.type)
            shape = body.lora_config
            wanted = (("attention", shape.train_attn), ("mlp", shape.train_mlp), ("unembed", shape.train_unembed))
            targets = tuple(target for target, trained in wanted if trained)
            if not targets:
                raise InvalidRequest("lora_config: train at least one of attn, mlp and unembed.")
            lora = LoraConfig(rank=shape.rank, alpha=ALPHA, targets=targets)
            validation.lora(lora, model)
            seed = seed_of(model_id) if shape.seed is None else shape.seed & SEED_BITS
            event = kinds.AddLoraRequested(
                base_model=model.name, lora=lora, seed=seed, user_metadata=body.user_metadata or {}
            )
            return Draft(adapters=1, event=event)

        return await self._for_model("add_lora", model_id, draft)

    async def load_as_new(self, body: m.LoadWeights) -> m.Submitted:
        """A new adapter that begins as a checkpoint."""
        self._require_small()
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
            event = kinds.AddLoraRequested(
                base_model=model.name,
                lora=checkpoint.lora,
                seed=seed_of(model_id),
                checkpoint=checkpoint.id,
                with_optimizer=body.optimizer,
                user_metadata=body.user_metadata or {},
            )
            return Draft(adapters=1, event=event)

        return await self._for_model("add_lora", model_id, draft)

    async def load_into(self, model_id: AdapterId, body: m.LoadWeights) -> m.Submitted:
        """A checkpoint in the adapter's place."""

        def draft(_: ModelInfo) -> Draft:
            checkpoint = self._at_path(body.path)
            check_loadable(checkpoint, body.optimizer)
            row = self._queries.adapter(self._tenant, model_id)
            if row is None:
                raise validation.no_adapter(model_id)
            if row.lora != checkpoint.lora:
                raise InvalidRequest(
                    f"{body.path} is of another shape than the model: make a new one from it"
                    " (create_training_client_from_state)."
                )
            return Draft(event=kinds.LoadRequested(checkpoint=checkpoint.id, with_optimizer=body.optimizer))

        return await self._for_model("load", model_id, draft)

    async def forward_backward(self, body: pb.ForwardBackwardRequest) -> m.Submitted:
        """Loss and logprobs, and gradients if not forward_only."""
        spec = codec.loss_spec(body)
        event = kinds.ForwardRequested if body.forward_only else kinds.ForwardBackwardRequested

        def draft(model: ModelInfo) -> Draft:
            settings = self._context.settings
            data, num_targets = codec.data(body, spec, model, settings.limits)
            num_tokens = sum(datum.num_tokens for datum in data)
            return Draft(
                event=event(
                    loss=spec,
                    num_datums=len(data),
                    num_tokens=num_tokens,
                    num_targets=num_targets,
                    chunk_tokens=settings.chunk_tokens,
                ),
                body=kinds.ForwardBackwardBody(data),
                tokens=num_tokens,
            )

        return await self._for_model(kinds.kind_of(event), body.model_id, draft)

    async def optim_step(self, body: m.OptimStep) -> m.Submitted:
        """One AdamW step."""
        if body.adam_params is None:
            named = (body.optimizer_params or {}).get("type", "none")
            raise InvalidRequest(f"optim_step: adam_params are needed; the optimizer {named!r} is not served.")
        adam = body.adam_params
        event = kinds.OptimStepRequested(
            adam=AdamParams(
                learning_rate=adam.learning_rate,
                beta1=adam.beta1,
                beta2=adam.beta2,
                eps=adam.eps,
                weight_decay=adam.weight_decay,
                grad_clip_norm=adam.grad_clip_norm,
            )
        )
        return await self._for_model("optim_step", body.model_id, lambda _: Draft(event=event))

    async def save(self, body: m.SaveWeights, *, external: bool) -> m.Submitted:
        """A checkpoint to train on, or to be taken away."""
        self._require_small()
        if body.age_encryption_recipients:
            raise InvalidRequest("age_encryption_recipients: checkpoints are not encrypted for others here.")
        path = names.Path(body.model_id, "external" if external else "state", names.checkpoint_name(body.path))

        def draft(_: ModelInfo) -> Draft:
            self._require_free(path, overwrite=body.overwrite)
            return Draft(event=self._save(path, body.seq_id, body.ttl_seconds, body.user_metadata))

        return await self._for_model("save", body.model_id, draft)

    async def save_for_sampler(self, body: m.SaveWeightsForSampler) -> m.Submitted:
        """A checkpoint to sample from; without a name for one sampling session, which is made with it."""
        self._require_small()
        if body.kind != "snapshot":
            raise InvalidRequest(f"kind: {body.kind!r} is not served; a sampler keeps the weights it was made with.")
        if body.path is not None:
            path = names.Path(body.model_id, "sampler", names.checkpoint_name(body.path))

            def named(_: ModelInfo) -> Draft:
                self._require_free(path, overwrite=False)
                return Draft(event=self._save(path, body.seq_id, body.ttl_seconds, body.user_metadata))

            return await self._for_model("save", body.model_id, named)
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
            return Draft(event=event, before=(self._sampler_event(made),))

        return await self._for_model("save", body.model_id, unnamed)

    async def copy_weights(self, body: m.CopyWeights, client: str) -> names.Path:
        """A checkpoint once more, of the same kind and with the same bytes, in a new run that cannot be trained. Its
        retry gives the same one."""
        self._require_small()
        key = self._caller.idempotency_key
        hashed = None if key is None else idempotency.request_hash("copy_weights", None, self._caller.raw)

        def made() -> kinds.Recorded | tuple[kinds.NewEvent, ...]:
            try:
                return self._copies(body, client, hashed)
            except UserError:
                # A copy whose first answer was lost is there, whatever became of its source.
                known = idempotency.find(self._context.store, self._tenant, key, hashed)
                if known is None:
                    raise
                return known

        found = await asyncio.to_thread(made)
        recorded = found if isinstance(found, kinds.Recorded) else await self._write(*found)
        assert isinstance(recorded.event, kinds.CheckpointCopied) and recorded.adapter is not None
        return names.Path(recorded.adapter, recorded.event.use, recorded.event.name)

    def _copies(self, body: m.CopyWeights, client: str, hashed: bytes | None) -> tuple[kinds.NewEvent, ...]:
        if body.destination_project_id is not None:
            check_project(body.destination_project_id, self._tenant)
        key = self._caller.idempotency_key
        before: tuple[kinds.NewEvent, ...] = ()
        if body.session_id is not None and body.model_seq_id is not None:
            self._living_session(body.session_id)
            run = names.model_id(body.session_id, body.model_seq_id)
            if self._queries.adapter(self._tenant, run) is not None:
                raise InvalidRequest(f"model_seq_id: there is a model {run} already; give a number that is free.")
        elif body.session_id is None and body.model_seq_id is None and body.destination_project_id is not None:
            started = kinds.SessionStarted(session=names.new_session(), client=client)
            run = names.model_id(started.session, 0)
            before = (self._event(started, key and f"{key}:session"),)
        else:
            raise InvalidRequest("copy_weights needs destination_project_id, or session_id and model_seq_id.")
        source = self._at_path(body.source_path)
        self._context.store.require_blobs(source.blobs.values())
        saved_of = self._queries.adapter(self._tenant, source.adapter)
        assert saved_of is not None
        copied = kinds.CheckpointCopied(
            checkpoint=new_id("ck"),
            source=source.id,
            name=source.name or source.id,
            use=source.use,
            base_model=saved_of.base_model,
            seed=saved_of.seed,
            step=source.step,
            lora=source.lora,
            num_bytes=source.num_bytes,
            state_digest=source.state_digest,
            ttl_s=body.ttl_seconds,
            user_metadata=source.user_metadata,
        )
        event = msgspec.structs.replace(
            self._event(copied, key),
            stream=f"adapter/{run}",
            adapter=run,
            shared=source.blobs,
            request_hash=hashed,
        )
        return (*before, event)

    async def create_sampler(self, body: m.CreateSamplingSession) -> SamplerId:
        """Weights to sample from: the base model's, or a checkpoint's."""
        session = names.session_id(body.session_id)
        sampler = names.sampler_id(session, body.sampling_session_seq_id)

        def made() -> kinds.NewEvent:
            self._living_session(session)
            if body.model_path is not None:
                checkpoint = self._at_path(body.model_path).id
            elif body.base_model is not None:
                check_base_model(body.base_model, self._context.model())
                checkpoint = None
            else:
                raise InvalidRequest("create_sampling_session needs base_model or model_path.")
            return self._sampler_event(kinds.SamplerCreated(sampler=sampler, session=session, checkpoint=checkpoint))

        await self._write(await asyncio.to_thread(made))
        return sampler

    async def sample(self, body: m.Asample) -> m.Submitted:
        """Continuations of a prompt with a sampler's weights, which an adapter of the sampler's name holds."""
        sampler = body.sampling_session_id
        row = await asyncio.to_thread(self.sampler, sampler)
        tensor = body.target_prompt_logprobs
        sparse = tensor is not None and tensor.sparse_crow_indices is not None

        def draft(model: ModelInfo) -> Draft:
            asked = sampling.request(body, model)
            tokens = asked.prompt
            limits = self._context.settings.limits
            prompt = validation.prompt(asked, model, limits.max_request_tokens)
            targets = validation.prompt_targets(asked, model)
            validation.sample_outputs(asked, model, limits.max_output_bytes)
            event = kinds.SampleRequested(
                params=asked.params,
                num_tokens=len(tokens),
                prompt_logprobs_last=body.prompt_logprobs_last_n,
                prompt_targets_sparse=sparse,
            )
            before = () if row.checkpoint is None else self._adapter_of(row, model)
            return Draft(event=event, body=kinds.SampleBody(prompt, targets), tokens=len(tokens), before=before)

        adapter = None if row.checkpoint is None else sampler
        recorded, _ = await self.submit("sample", adapter, draft, path_id=adapter)
        ids = [f"{sampler}:{body.seq_id}:{i}" for i in range(body.num_samples)]
        return m.Submitted(request_id=str(recorded.position), sample_sequence_ids=ids)

    async def join_sampler(self, sampler: SamplerId) -> int:
        """A number that no other client of the sampler has."""
        row = await asyncio.to_thread(self.sampler, sampler)
        return (await self._write(self._event(kinds.SamplerJoined(sampler=row.id), None))).position

    async def cancel_sample(self, text: str) -> None:
        """The scheduler is told, unless it was or the answer is there."""
        row = await asyncio.to_thread(self.request, text)
        if row.kind != "sample":
            raise InvalidRequest(f"The request {text!r} is of kind {row.kind}; only samples can be cancelled.")
        if row.state == "pending":
            await self._write(self._event(kinds.SampleCancelled(request=row.id), f"tinker:cancel:{row.id}"))

    async def create_session(self, body: m.CreateSession, client: str) -> SessionId:
        """A session of the caller's. Its retry gives the same one."""
        self._require_small()
        started = kinds.SessionStarted(
            session=names.new_session(),
            client=client,
            display_name=body.display_name,
            tags=body.tags,
            user_metadata=body.user_metadata or {},
        )
        key = self._caller.idempotency_key
        recorded = await self._write(self._event(started, f"tinker:session:{key}" if key else None))
        assert isinstance(recorded.event, kinds.SessionStarted)
        return recorded.event.session

    async def hear_of_session(self, id: str) -> None:
        """Its program runs. Raises HTTPException 410 where it has ended.

        Written down only as often as it takes to know that it did not fall silent for `session_expiry_s`.
        """
        expiry_s = self._context.settings.session_expiry_s
        row = await asyncio.to_thread(self.session, id)
        if row.ended_us is not None:
            raise HTTPException(status_code=410, detail=f"The session {row.id} has ended.")
        if expiry_s is not None and time.time_ns() // 1000 - row.heard_us > expiry_s * 1e6 / SIGNS_OF_LIFE:
            await self._write(self._event(kinds.SessionHeard(session=row.id), None))

    async def finish_session(self, session: SessionId, reason: str, detail: str | None) -> None:
        """What it made leaves the executor; what it saved stays. Once is enough: again is fine."""
        self._require_small()
        row = await asyncio.to_thread(self.session, session)
        if row.ended_us is not None:
            return
        events = await asyncio.to_thread(ending, self._queries, self._tenant, row.id, reason, detail)
        key, trace = self._caller.principal.key_id, self._caller.correlation
        await self._write(*(msgspec.structs.replace(each, actor=key, correlation=trace) for each in events))

    async def revoke_key(self, key_id: str) -> None:
        """A key of the caller's."""
        await self._write(self._event(kinds.KeyRevoked(key_id=key_id), None))

    async def change_checkpoint(
        self,
        row: CheckpointRow,
        *,
        deleted: bool = False,
        published: bool | None = None,
        expires_us: int | msgspec.UnsetType | None = msgspec.UNSET,
    ) -> None:
        """What is not given stays as it is."""
        changed = kinds.CheckpointChanged(
            checkpoint=row.id,
            expires_us=row.expires_us if isinstance(expires_us, msgspec.UnsetType) else expires_us,
            published=row.published if published is None else published,
            deleted=deleted,
        )
        await self._write(self._event(changed, None))
