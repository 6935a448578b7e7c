"""What the tinker protocol can be asked to do, as the request events of `/v1`.

A request is known by what the SDK numbers it with (model and seq_id, session and model_seq_id, ...), so that a retry
gives the request of the first time. Requests run in the order in which they arrive: the SDK sends a model's one after
another, but for the chunks of one forward_backward, whose gradients add in any order.
"""

from tinkerbell.api import validation
from tinkerbell.api.submitting import Draft
from tinkerbell.api.tinker import codec, names, sampling
from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker import wire_pb2 as pb
from tinkerbell.api.tinker.base import SEED_BITS, check_base_model, check_optimizer, seed_of
from tinkerbell.api.tinker.checkpoints import CheckpointSubmitting
from tinkerbell.api.tinker.sessions import SessionSubmitting
from tinkerbell.errors import InvalidRequest, shown
from tinkerbell.events import kinds
from tinkerbell.types import AdamParams, LoraConfig, ModelInfo, SamplerId

ALPHA = 32.0
"""Of every adapter made here: the protocol has no word for it."""


class TinkerSubmitter(CheckpointSubmitting, SessionSubmitting):
    """Submits one caller's request."""

    async def create_model(self, body: m.CreateModel) -> m.Submitted:
        """A new adapter with the id `<session>:train:<n>`."""
        model_id = names.model_id(names.session_id(body.session_id), body.model_seq_id)

        def draft(model: ModelInfo) -> Draft:
            session = self._living_session(body.session_id)
            check_base_model(body.base_model, model)
            check_optimizer(body.optimizer_config.type)
            shape = body.lora_config
            wanted = (("attention", shape.train_attn), ("mlp", shape.train_mlp), ("unembed", shape.train_unembed))
            targets = tuple(target for target, trained in wanted if trained)
            if not targets:
                raise InvalidRequest("lora_config: train at least one of attn, mlp and unembed.")
            lora = validation.within("lora_config", LoraConfig(rank=shape.rank, alpha=ALPHA, targets=targets))
            validation.lora(lora, model)
            seed = seed_of(model_id) if shape.seed is None else shape.seed & SEED_BITS
            event = kinds.AddLoraRequested(
                base_model=model.name,
                base_hash=model.hash,
                lora=lora,
                seed=seed,
                user_metadata=body.user_metadata or {},
            )
            return Draft(event=event, session=session.id)

        return await self._for_model("add_lora", model_id, draft)

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
            )

        return await self._for_model(kinds.kind_of(event), body.model_id, draft)

    async def optim_step(self, body: m.OptimStep) -> m.Submitted:
        """One AdamW step."""
        if body.adam_params is None:
            named = (body.optimizer_params or {}).get("type", "none")
            raise InvalidRequest(f"optim_step: adam_params are needed; the optimizer {shown(named)} is not served.")
        adam = body.adam_params
        params = AdamParams(
            learning_rate=adam.learning_rate,
            beta1=adam.beta1,
            beta2=adam.beta2,
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            grad_clip_norm=adam.grad_clip_norm,
        )
        event = kinds.OptimStepRequested(adam=validation.within("adam_params", params))
        return await self._for_model("optim_step", body.model_id, lambda _: Draft(event=event))

    async def create_sampler(self, body: m.CreateSamplingSession) -> SamplerId:
        """Weights to sample from: the base model's, or a checkpoint's."""
        session = names.session_id(body.session_id)
        sampler = names.sampler_id(session, body.sampling_session_seq_id)

        def made() -> kinds.NewEvent:
            self._living_session(session)
            if body.model_path is not None:
                found = self._at_path(body.model_path)
                self.require_base(found.adapter, body.model_path)
                checkpoint = found.id
            elif body.base_model is not None:
                check_base_model(body.base_model, self._context.model())
                checkpoint = None
            else:
                raise InvalidRequest("create_sampling_session needs base_model or model_path.")
            created = kinds.SamplerCreated(sampler=sampler, session=session, checkpoint=checkpoint)
            return self._sampler_event(created, f"{body.base_model} {body.model_path}")

        await self._write(await self._prepared(made))
        return sampler

    async def sample(self, body: m.Asample) -> m.Submitted:
        """Continuations of a prompt with a sampler's weights, which an adapter of the sampler's name holds."""
        sampler = body.sampling_session_id
        row = await self._prepared(self.sampler, sampler)
        tensor = body.target_prompt_logprobs
        sparse = tensor is not None and tensor.sparse_crow_indices is not None

        def draft(model: ModelInfo) -> Draft:
            limits = self._context.settings.limits
            asked = sampling.request(body, model, limits.max_output_bytes)
            tokens = asked.prompt
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
            return Draft(
                event=event,
                body=kinds.SampleBody(prompt, targets),
                before=before,
                session=row.session,
            )

        adapter = None if row.checkpoint is None else sampler
        recorded, _ = await self.submit("sample", adapter, draft, path_id=adapter)
        ids = [f"{sampler}:{body.seq_id}:{i}" for i in range(body.num_samples)]
        return m.Submitted(request_id=str(recorded.position), sample_sequence_ids=ids)

    async def join_sampler(self, sampler: SamplerId) -> int:
        """A number that no other client of the sampler has."""
        row = await self._prepared(self.sampler, sampler)
        return (await self._write(self._event(kinds.SamplerJoined(sampler=row.id), None, row.session))).position

    async def cancel_sample(self, text: str) -> None:
        """The scheduler is told, unless it was or the answer is there."""
        row = await self._prepared(self.request, text)
        if row.kind != "sample":
            raise InvalidRequest(f"The request {shown(text)} is of kind {row.kind}; only samples can be cancelled.")
        if row.state == "pending":
            await self._write(self._event(kinds.SampleCancelled(request=row.id), f"tinker:cancel:{row.id}"))
