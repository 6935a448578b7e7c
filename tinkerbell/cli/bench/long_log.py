"""A log that has grown long: lives of adapters from their first request to their removal, appended in bulk."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from tinkerbell.events import kinds
from tinkerbell.events.kinds import NewEvent, Recorded
from tinkerbell.events.store import EventStore
from tinkerbell.types import SYSTEM_TENANT, AdamParams, Datum, LoraConfig, LossSpec, SamplingParams, TenantId

LIVES_AT_ONCE = 32
BASE32 = str.maketrans("0189", "wxyz")
"""Ids have no such digits."""
LORA = LoraConfig(rank=4)
_DATUM = Datum(tokens=bytes(64), targets=bytes(64), loss_inputs={})
_COST_US = 400


@dataclass
class Life:
    """One program: a session, its model, a sampler."""

    tenant: TenantId
    session: str = field(default_factory=lambda: f"se_{secrets.token_hex(10).translate(BASE32)}")

    @property
    def model(self) -> str:
        return f"{self.session}:train:0"

    @property
    def sampler(self) -> str:
        return f"{self.session}:sample:0"


class LongLog:
    """Appends lives; what they saved shares the bytes of the first checkpoint."""

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._blobs: dict[str, str] = {}
        self._batches = 0

    def fill(self, tenant: TenantId, num_lives: int, num_steps: int) -> list[Life]:
        """So many programs, one after the other but for LIVES_AT_ONCE: a session starts, makes a model, takes
        `num_steps` training steps, saves the model, opens a sampler; then the model is removed, the session ends."""
        lives = [Life(tenant) for _ in range(num_lives)]
        for start in range(0, num_lives, LIVES_AT_ONCE):
            self._live(lives[start : start + LIVES_AT_ONCE], num_steps)
        return lives

    def wait(self, tenant: TenantId, num_requests: int) -> None:
        """Samples from the base model that have no answer."""
        event = kinds.SampleRequested(params=SamplingParams(max_tokens=1), num_tokens=8)
        body = kinds.SampleBody(bytes(32))
        new = NewEvent(event=event, body=body, tenant=tenant, stream=f"tenant/{tenant}")
        self._store.append(*[new] * num_requests)

    def train(self, lives: Sequence[Life], steps: Iterator[int]) -> None:
        """Training steps of models that are there, numbered from 1."""
        body = kinds.ForwardBackwardBody([_DATUM])
        for step in steps:
            loss = LossSpec(name="cross_entropy")
            gradients = kinds.ForwardBackwardRequested(loss=loss, num_datums=1, num_tokens=16)
            update = kinds.OptimStepRequested(adam=AdamParams(learning_rate=1e-4))
            asked = self._store.append(
                *(
                    self._request(life, event, body if event is gradients else None)
                    for life in lives
                    for event in (gradients, update)
                )
            )
            done: list[kinds.AnyResult] = [
                kinds.ForwardBackwardCompleted(loss=1.0, metrics={}, num_tokens=16, cost_us=_COST_US),
                kinds.OptimStepCompleted(step=step, grad_norm=1.0, state_digest=f"{step:064x}"),
            ]
            self._ran(asked[::2])
            logprobs = kinds.LogprobsBody([bytes(64)])
            self._store.append(
                *(
                    self._result(request, done[index % 2], logprobs if index % 2 == 0 else None)
                    for index, request in enumerate(asked)
                )
            )

    def _live(self, lives: Sequence[Life], num_steps: int) -> None:
        store = self._store
        store.append(
            *(self._own(life, kinds.SessionStarted(session=life.session, client="tinkerbell bench")) for life in lives)
        )
        added = kinds.AddLoraRequested(base_model="fake", lora=LORA, seed=7)
        made = kinds.AddLoraCompleted(num_parameters=1000, step=0, state_digest="0" * 64)
        self._answered(lives, added, made)
        self.train(lives, iter(range(1, num_steps + 1)))
        self._save(lives)
        store.append(
            *(self._own(life, kinds.SamplerCreated(sampler=life.sampler, session=life.session)) for life in lives)
        )
        self._answered(lives, kinds.RemoveLoraRequested(), kinds.RemoveLoraCompleted())
        store.append(*(self._ended(life) for life in lives))

    def _save(self, lives: Sequence[Life]) -> None:
        for life in lives:
            checkpoint = f"ck_{life.session[3:]}"
            (asked,) = self._store.append(
                self._request(life, kinds.SaveRequested(checkpoint=checkpoint, name="final"), None)
            )
            saved = kinds.SaveCompleted(
                checkpoint=checkpoint, name="final", step=1, lora=LORA, num_bytes=1000, state_digest="0" * 64
            )
            new = self._result(asked, saved, None)
            first = {"weights": b"w" * 1000, "adapter_config": b"{}", "optimizer": b"o" * 500}
            recorded = self._store.append(
                msgspec.structs.replace(new, blobs=first)
                if not self._blobs
                else msgspec.structs.replace(new, shared=self._blobs)
            )
            self._blobs = self._blobs or recorded[0].blobs

    def _answered(self, lives: Sequence[Life], event: kinds.AnyRequest, result: kinds.AnyResult) -> None:
        asked = self._store.append(*(self._request(life, event, None) for life in lives))
        self._store.append(*(self._result(request, result, None) for request in asked))

    def _ran(self, requests: Sequence[Recorded]) -> None:
        self._batches += 1
        batch = f"0.{self._batches}"
        units = [kinds.PlannedUnit(request.position, 0, 1) for request in requests]
        charges = [(request.position, _COST_US) for request in requests]
        busy_us = _COST_US * len(requests)
        planned = kinds.BatchPlanned(batch=batch, lane="train", environment="e" * 64, units=units, estimated_us=busy_us)
        ran = kinds.BatchRan(batch=batch, busy_us=busy_us, charges=charges)
        self._store.append(
            *(NewEvent(event=event, tenant=SYSTEM_TENANT, stream="system/scheduler") for event in (planned, ran))
        )

    def _own(self, life: Life, event: kinds.AnyEvent) -> NewEvent:
        return NewEvent(event=event, tenant=life.tenant, stream=f"tenant/{life.tenant}")

    def _ended(self, life: Life) -> NewEvent:
        new = self._own(life, kinds.SessionEnded(session=life.session, reason="success", detail=None))
        return msgspec.structs.replace(new, idempotency_key=f"tinker:end:{life.session}", request_hash=bytes(32))

    def _request(self, life: Life, event: kinds.AnyRequest, body: kinds.Body | None) -> NewEvent:
        return NewEvent(event=event, body=body, tenant=life.tenant, stream=f"adapter/{life.model}", adapter=life.model)

    def _result(self, request: Recorded, event: kinds.AnyResult, body: kinds.Body | None) -> NewEvent:
        return NewEvent(
            event=event,
            body=body,
            tenant=request.tenant,
            stream=request.stream,
            adapter=request.adapter,
            causation=request.position,
        )
