"""What `/v1` can be asked to do, from wire bodies to request events."""

import secrets
from collections.abc import Callable

import msgspec

from tinkerbell import wire
from tinkerbell.api import validation, views
from tinkerbell.api.submitting import Draft, Submitting, new_id
from tinkerbell.errors import InvalidRequest, shown
from tinkerbell.events import kinds
from tinkerbell.events.names import SavedName
from tinkerbell.types import AdapterId, LoraConfig, ModelInfo


class Submitter(Submitting):
    """Submits one caller's requests of `/v1`."""

    async def add_lora(self, body: wire.AddLora) -> wire.Future:
        """A new adapter, pending until an executor holds it."""

        def draft(model: ModelInfo) -> Draft:
            if body.base_model is not None and body.base_model != model.name:
                raise InvalidRequest(f"base_model: this server serves '{model.name}', not {shown(body.base_model)}.")
            lora, checkpoint = body.lora or LoraConfig(), None
            if body.checkpoint is not None:
                if body.lora is not None:
                    raise InvalidRequest("lora: leave it out with a checkpoint, which has its own.")
                checkpoint = self.usable_checkpoint(body.checkpoint)
                self.require_base(checkpoint.adapter, f"checkpoint {checkpoint.id}")
                lora = checkpoint.lora
            validation.lora(lora, model)
            return Draft(
                event=kinds.AddLoraRequested(
                    base_model=model.name,
                    base_hash=model.hash,
                    lora=lora,
                    seed=secrets.randbits(63) if body.seed is None else body.seed,
                    name=body.name,
                    checkpoint=body.checkpoint,
                    with_optimizer=checkpoint is not None and body.with_optimizer,
                ),
            )

        return await self._future("add_lora", new_id("ad"), draft, path_id=None)

    async def remove_lora(self, adapter: AdapterId) -> wire.Future:
        """The adapter leaves after what was asked before. Asked again, it is the same request, unless that failed."""
        asked = await self._context.read(self._tenant, self._removal, validation.adapter_id(adapter))
        if asked is not None:
            return views.submitted(asked, None)
        return await self._for_adapter("remove_lora", adapter, lambda _: Draft(event=kinds.RemoveLoraRequested()))

    def _removal(self, adapter: AdapterId) -> kinds.Recorded | None:
        """The request that removes or has removed the adapter."""
        store = self._context.store
        row = store.queries.newest_request(self._tenant, adapter, "remove_lora")
        return store.get(row.id) if row is not None and row.state != "failed" else None

    async def forward(self, adapter: AdapterId, body: wire.Forward) -> wire.Future:
        """Loss, logprobs and outputs only."""

        def draft(model: ModelInfo) -> Draft:
            made = self._train(kinds.ForwardRequested, body, model)
            if body.outputs is None:
                return made
            limits = self._context.settings.limits
            num_tokens = sum(len(datum.tokens) for datum in body.data)
            validation.outputs(body.outputs, num_tokens, model, limits.max_output_bytes)
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
            limits = self._context.settings.limits
            prompt = validation.prompt(body, model, limits.max_request_tokens)
            targets = validation.prompt_targets(body, model)
            validation.sample_outputs(body, model, limits.max_output_bytes)
            num_tokens = len(body.prompt)
            return Draft(
                event=kinds.SampleRequested(params=body.params, num_tokens=num_tokens),
                body=kinds.SampleBody(prompt, targets),
            )

        if adapter is None:
            return await self._future("sample", None, draft, path_id=None)
        return await self._for_adapter("sample", adapter, draft)

    async def save(self, adapter: AdapterId, body: wire.Save) -> wire.Future:
        """Keep the adapter as a checkpoint."""
        checkpoint, name = new_id("ck"), body.name

        def draft(_: ModelInfo) -> Draft:
            replaces = self.holders(SavedName(adapter, "state", name)) if name is not None and body.overwrite else ()
            event = kinds.SaveRequested(checkpoint=checkpoint, name=name, replaces=replaces)
            return Draft(event=event, expected_seq=body.seq)

        return await self.save_named(lambda: self._for_adapter("save", adapter, draft), overwrite=body.overwrite)

    async def load(self, adapter: AdapterId, body: wire.Load) -> wire.Future:
        """Put a checkpoint in the adapter's place."""

        def draft(_: ModelInfo) -> Draft:
            checkpoint = self.usable_checkpoint(body.checkpoint)
            row = self._context.store.queries.adapter(self._tenant, adapter)
            if row is None:
                raise validation.no_adapter(adapter)
            self.require_base(adapter, f"adapter {adapter}")
            self.require_base(checkpoint.adapter, f"checkpoint {checkpoint.id}")
            if checkpoint.lora != row.lora:
                raise InvalidRequest(
                    f"checkpoint: {body.checkpoint} has {_shape(checkpoint.lora)}, the adapter {_shape(row.lora)};"
                    " start a new adapter from the checkpoint instead."
                )
            event = kinds.LoadRequested(checkpoint=body.checkpoint, with_optimizer=body.with_optimizer)
            return Draft(event=event, expected_seq=body.seq)

        return await self._for_adapter("load", adapter, draft)

    async def _for_adapter(self, kind: str, adapter: AdapterId, draft: Callable[[ModelInfo], Draft]) -> wire.Future:
        return await self._future(kind, validation.adapter_id(adapter), draft, path_id=adapter)

    async def _future(
        self,
        kind: str,
        adapter: AdapterId | None,
        draft: Callable[[ModelInfo], Draft],
        *,
        path_id: AdapterId | None,
    ) -> wire.Future:
        recorded, place = await self.submit(kind, adapter, draft, path_id=path_id)
        return views.submitted(recorded, place)

    def _train(
        self,
        event: type[kinds.ForwardRequested] | type[kinds.ForwardBackwardRequested],
        body: wire.ForwardBackward,
        model: ModelInfo,
    ) -> Draft:
        data = validation.data(body, model, self._context.settings.limits)
        num_tokens = sum(datum.num_tokens for datum in data)
        return Draft(
            event=event(
                loss=body.loss,
                num_datums=len(data),
                num_tokens=num_tokens,
                num_targets=body.num_targets,
                chunk_tokens=self._context.settings.chunk_tokens,
            ),
            body=kinds.ForwardBackwardBody(data),
            expected_seq=body.seq,
        )


def _shape(lora: LoraConfig) -> str:
    return f"rank {lora.rank}, alpha {lora.alpha:g} and targets {', '.join(lora.targets)}"
