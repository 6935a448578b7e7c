"""Events to append in tests: a builder for each step of an adapter's life, and one example of every kind."""

import hashlib
import struct

import msgspec

from tinkerbell.events import kinds
from tinkerbell.events.kinds import AnyEvent, Body, NewEvent, Recorded
from tinkerbell.types import (
    SYSTEM_TENANT,
    AdamParams,
    Datum,
    LoraConfig,
    LossSpec,
    ModelInfo,
    OutputSpec,
    SampledSequence,
    SamplingParams,
)

MODEL = ModelInfo(
    name="fake",
    vocab_size=256,
    max_length=1024,
    targets=("q_proj", "v_proj"),
    eos_tokens=(0,),
    tokenizer="",
)


def ints(*values: int) -> bytes:
    """Little-endian int32."""
    return struct.pack(f"<{len(values)}i", *values)


def floats(*values: float) -> bytes:
    """Little-endian float32."""
    return struct.pack(f"<{len(values)}f", *values)


def datum(length: int = 3) -> Datum:
    """A sequence of `length` tokens."""
    return Datum(
        tokens=ints(*range(length)),
        targets=ints(*range(1, length + 1)),
        loss_inputs={"weights": floats(*[1.0] * length)},
    )


def request_hash(text: str) -> bytes:
    """A hash as the HTTP edge makes one."""
    return hashlib.sha256(text.encode()).digest()


def request(
    event: AnyEvent,
    adapter: str | None = "ad_one",
    tenant: str = "alice",
    *,
    body: Body | None = None,
    key: str | None = None,
    key_of: str | None = None,
    expected_seq: int | None = None,
) -> NewEvent:
    """A tenant's request. `key`: idempotency key; `key_of`: what its request hash is taken of."""
    return NewEvent(
        event=event,
        tenant=tenant,
        stream=f"adapter/{adapter}" if adapter else f"tenant/{tenant}",
        adapter=adapter,
        body=body,
        actor="k_test",
        idempotency_key=key,
        request_hash=request_hash(key_of or key) if key else None,
        expected_seq=expected_seq,
    )


def result(
    event: AnyEvent,
    of: Recorded,
    *,
    body: Body | None = None,
    blobs: dict[str, bytes] | None = None,
    fence: tuple[str, int] | None = None,
) -> NewEvent:
    """The answer to a recorded request."""
    return NewEvent(
        event=event,
        tenant=of.tenant,
        stream=of.stream,
        adapter=of.adapter,
        body=body,
        blobs=blobs or {},
        causation=of.position,
        fence=fence,
    )


def system(event: AnyEvent, fence: tuple[str, int] | None = None) -> NewEvent:
    """An event of the scheduler's own."""
    return NewEvent(event=event, tenant=SYSTEM_TENANT, stream="system/scheduler", actor="here", fence=fence)


def add_lora(
    adapter: str = "ad_one", tenant: str = "alice", *, key: str | None = None, name: str | None = None
) -> NewEvent:
    """add_lora.requested"""
    event = kinds.AddLoraRequested(base_model="fake", lora=LoraConfig(rank=4), seed=7, name=name)
    return request(event, adapter, tenant, key=key)


def add_lora_completed(of: Recorded) -> NewEvent:
    """add_lora.completed"""
    return result(kinds.AddLoraCompleted(num_parameters=12, step=0, state_digest="d0"), of)


def forward_backward(
    adapter: str = "ad_one",
    tenant: str = "alice",
    *,
    data: list[Datum] | None = None,
    key: str | None = None,
    expected_seq: int | None = None,
) -> NewEvent:
    """forward_backward.requested"""
    data = data or [datum()]
    tokens = sum(item.num_tokens for item in data)
    event = kinds.ForwardBackwardRequested(loss=LossSpec(), num_datums=len(data), num_tokens=tokens)
    body = kinds.ForwardBackwardBody(data=data)
    return request(event, adapter, tenant, body=body, key=key, expected_seq=expected_seq)


def forward_backward_completed(
    of: Recorded, *, loss: float = 6.0, cost_us: int = 0, batch: str | None = None
) -> NewEvent:
    """forward_backward.completed"""
    assert isinstance(of.event, kinds.ForwardBackwardRequested)
    event = kinds.ForwardBackwardCompleted(
        loss=loss, metrics={}, num_tokens=of.event.num_tokens, cost_us=cost_us, batch=batch
    )
    return result(event, of, body=kinds.LogprobsBody(logprobs=[floats(-2.0, -2.0, -2.0)]))


def configured(tenant: str = "alice", **limits: int) -> NewEvent:
    """Limits of a tenant's own."""
    event = kinds.TenantConfigured(**limits)  # type: ignore[arg-type]
    return NewEvent(event=event, tenant=tenant, stream=f"tenant/{tenant}")


def optim_step(adapter: str = "ad_one", tenant: str = "alice", *, learning_rate: float = 1e-3) -> NewEvent:
    """optim_step.requested"""
    return request(kinds.OptimStepRequested(adam=AdamParams(learning_rate=learning_rate)), adapter, tenant)


def optim_step_completed(of: Recorded, step: int) -> NewEvent:
    """optim_step.completed"""
    return result(kinds.OptimStepCompleted(step=step, grad_norm=0.5, state_digest=f"d{step}"), of)


def sample(adapter: str | None = "ad_one", tenant: str = "alice") -> NewEvent:
    """sample.requested"""
    event = kinds.SampleRequested(params=SamplingParams(max_tokens=4), num_tokens=2)
    return request(event, adapter, tenant, body=kinds.SampleBody(prompt=ints(1, 2)))


def sample_completed(of: Recorded) -> NewEvent:
    """sample.completed"""
    sequence = SampledSequence(tokens=ints(5, 0), logprobs=floats(-0.5, -0.25), stop_reason="stop")
    event = kinds.SampleCompleted(step=0, num_prompt_tokens=2, num_sampled_tokens=2)
    return result(event, of, body=kinds.SamplesBody(sequences=[sequence], prompt_logprobs=None))


def save(adapter: str = "ad_one", tenant: str = "alice", checkpoint: str = "ck_one") -> NewEvent:
    """save.requested"""
    return request(kinds.SaveRequested(checkpoint=checkpoint, name=f"my-{checkpoint}"), adapter, tenant)


def save_completed(of: Recorded, weights: bytes = b"weights") -> NewEvent:
    """save.completed"""
    assert isinstance(of.event, kinds.SaveRequested)
    event = kinds.SaveCompleted(
        checkpoint=of.event.checkpoint,
        name=of.event.name,
        step=1,
        lora=LoraConfig(rank=4),
        num_bytes=len(weights),
        state_digest="d1",
    )
    return result(event, of, blobs={"weights": weights, "adapter_config": b"{}", "optimizer": b"moments" + weights})


def copied(of: Recorded, checkpoint: str = "ck_copy", adapter: str = "ad_copy") -> NewEvent:
    """checkpoint.copied of a save.completed"""
    assert isinstance(of.event, kinds.SaveCompleted)
    event = kinds.CheckpointCopied(
        checkpoint=checkpoint,
        source=of.event.checkpoint,
        name="mine",
        use=of.event.use,
        base_model="tiny",
        seed=7,
        step=of.event.step,
        lora=of.event.lora,
        num_bytes=of.event.num_bytes,
        state_digest=of.event.state_digest,
    )
    return NewEvent(event=event, tenant=of.tenant, stream=f"adapter/{adapter}", adapter=adapter, shared=of.blobs)


def remove_lora(adapter: str = "ad_one", tenant: str = "alice") -> NewEvent:
    """remove_lora.requested"""
    return request(kinds.RemoveLoraRequested(), adapter, tenant)


def failed(of: Recorded, *, cost_us: int = 0) -> NewEvent:
    """The failure of any request."""
    cls = kinds.FAILED[kinds.kind_of(of.event)]
    return result(cls(category="user", code="invalid-request", message="no", cost_us=cost_us), of)


def examples() -> dict[str, tuple[AnyEvent, Body | None]]:
    """Event type -> an event of it that uses every field, and its body."""
    lora = LoraConfig(rank=8, alpha=16.0, targets=("attention", "lm_head"))
    adam = AdamParams(learning_rate=0.001, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.1, grad_clip_norm=1.0)
    params = SamplingParams(
        max_tokens=9,
        num_samples=2,
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        seed=2**63 - 1,
        stop=("\n\n", "end \u00e9\u4e16"),
        stop_tokens=(0, 2),
        prompt_logprobs=True,
        top_logprobs=3,
        prompt_top_logprobs=64,
        prompt_draws=1,
    )
    loss = LossSpec(name="ppo", config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2})
    data_body = kinds.ForwardBackwardBody(data=[datum(3), datum(2)])
    logprobs = kinds.LogprobsBody(logprobs=[floats(-1.5, -0.25, 0.0), floats(-3.0, -1.0)])
    sequence = SampledSequence(tokens=ints(5, 0), logprobs=floats(-0.5, -0.25), stop_reason="stop")
    ran = {"batch": "3.14", "cost_us": 1500}
    why = {"category": "user", "code": "no-gradients", "message": "there is nothing to apply"}
    events: list[tuple[AnyEvent, Body | None]] = [
        (
            kinds.AddLoraRequested(
                base_model="fake",
                lora=lora,
                seed=2**62,
                name="mine",
                checkpoint="ck_one",
                with_optimizer=True,
                user_metadata={"k": "v"},
                num_parameters=4096,
            ),
            None,
        ),
        (kinds.RemoveLoraRequested(), None),
        (
            kinds.ForwardRequested(
                loss=loss,
                num_datums=2,
                num_tokens=5,
                outputs=OutputSpec(entropy=True, logsumexp=True, top_k=2, logits=True),
            ),
            data_body,
        ),
        (kinds.ForwardBackwardRequested(loss=loss, num_datums=2, num_tokens=5), data_body),
        (kinds.OptimStepRequested(adam=adam), None),
        (
            kinds.SampleRequested(params=params, num_tokens=3, prompt_logprobs_last=2),
            kinds.SampleBody(prompt=ints(1, 2, 3)),
        ),
        (
            kinds.SaveRequested(
                checkpoint="ck_one",
                name="mine",
                use="sampler",
                ttl_s=60,
                user_metadata={"k": "v"},
                sampler="se_one:sample:0",
            ),
            None,
        ),
        (kinds.LoadRequested(checkpoint="ck_one", with_optimizer=False), None),
        (kinds.SampleCancelled(request=6), None),
        (kinds.AddLoraCompleted(num_parameters=1024, step=0, state_digest="ab" * 32, **ran), None),
        (kinds.RemoveLoraCompleted(**ran), None),
        (
            kinds.ForwardCompleted(loss=1.75, metrics={"tokens": 5.0}, num_tokens=5, logprobs_digest="56" * 32, **ran),
            kinds.OutputsBody(logprobs=logprobs.logprobs),
        ),
        (
            kinds.ForwardBackwardCompleted(
                loss=1.75, metrics={"kl": 0.1}, num_tokens=5, logprobs_digest="56" * 32, **ran
            ),
            logprobs,
        ),
        (
            kinds.OptimStepCompleted(
                step=3,
                grad_norm=0.1,
                state_digest="cd" * 32,
                gradient_digest="12" * 32,
                weights_digest="34" * 32,
                **ran,
            ),
            None,
        ),
        (
            kinds.SampleCompleted(step=3, num_prompt_tokens=3, num_sampled_tokens=2, **ran),
            kinds.SamplesBody(sequences=[sequence], prompt_logprobs=floats(-1.0, -2.0)),
        ),
        (
            kinds.SaveCompleted(
                checkpoint="ck_one",
                name=None,
                step=3,
                lora=lora,
                num_bytes=99,
                state_digest="cd" * 32,
                use="external",
                ttl_s=60,
                user_metadata={"k": "v"},
                **ran,
            ),
            None,
        ),
        (kinds.LoadCompleted(checkpoint="ck_one", step=3, state_digest="cd" * 32, **ran), None),
        *[(cls(**why, **ran), None) for cls in (*kinds.FAILED.values(), kinds.RequestFailed)],
        (
            kinds.BatchPlanned(
                batch="3.14",
                lane="train",
                environment="ef" * 32,
                units=[kinds.PlannedUnit(5, 0, 2), kinds.PlannedUnit(6, 0, 0)],
                estimated_us=2000,
            ),
            None,
        ),
        (kinds.BatchRan(batch="3.14", busy_us=1500, charges=[(5, 1000), (6, 500)]), None),
        (kinds.BatchLost(batch="3.14", reason="the executor died"), None),
        (
            kinds.CheckpointWritten(
                checkpoint="ck_two", after_seq=7, step=3, lora=lora, num_bytes=99, state_digest="cd" * 32
            ),
            None,
        ),
        (
            kinds.EnvironmentRecorded(
                digest="ef" * 32,
                executor="fake",
                exact=True,
                model=MODEL,
                facts={"threads": "2", "dtype": "float32"},
                source="package:fake",
                options={"vocab_size": "128"},
            ),
            None,
        ),
        (kinds.LeaseGranted(resource="scheduler", holder="here", epoch=3), None),
        (
            kinds.SessionStarted(
                session="se_one", client="tinker/1.2.3", display_name="mine", tags=["a"], user_metadata={"k": [1]}
            ),
            None,
        ),
        (kinds.SessionHeard(session="se_one"), None),
        (kinds.SessionEnded(session="se_one", reason="errored", detail="no memory"), None),
        (kinds.SamplerCreated(sampler="se_one:sample:0", session="se_one", checkpoint="ck_one"), None),
        (kinds.SamplerJoined(sampler="se_one:sample:0"), None),
        (kinds.CheckpointChanged(checkpoint="ck_one", expires_us=2**60, published=True, deleted=True), None),
        (
            kinds.CheckpointCopied(
                checkpoint="ck_two",
                source="ck_one",
                name="mine",
                use="sampler",
                base_model="tiny",
                seed=7,
                step=3,
                lora=lora,
                num_bytes=99,
                state_digest="cd" * 32,
                ttl_s=3600,
                user_metadata={"k": "v"},
            ),
            None,
        ),
        (kinds.KeyCreated(key_id="k_one", key_hash="12" * 32, admin=True, note="laptop"), None),
        (kinds.KeyRevoked(key_id="k_one"), None),
        (
            kinds.TenantConfigured(
                weight=2.5,
                max_pending_requests=10,
                max_pending_tokens=2000,
                max_adapters=3,
                max_adapter_bytes=4000,
                max_sessions=5,
                max_samplers=6,
                max_checkpoints=7,
                max_stored_bytes=8000,
            ),
            None,
        ),
        (kinds.LogSealed(position=41, root="78" * 32, num_streams=3), None),
        (
            kinds.TenantErased(
                adapters=["ad_one"],
                checkpoints=["ck_one", "ck_two"],
                data_keys=["9a" * 16],
                num_bodies=4,
                num_blobs=6,
                num_bytes=5000,
            ),
            None,
        ),
        (
            kinds.BulkCompacted(
                before_us=1_700_000_000_000_000, positions=[3, 5, 8], num_bodies=2, num_blobs=3, num_bytes=5000
            ),
            None,
        ),
    ]
    return {kinds.type_of(event): (event, body) for event, body in events}


def every_type() -> set[str]:
    """Types in the closed vocabulary."""
    union = msgspec.inspect.type_info(kinds.AnyEvent)
    assert isinstance(union, msgspec.inspect.UnionType)
    return {str(item.tag) for item in union.types if isinstance(item, msgspec.inspect.StructType)}
