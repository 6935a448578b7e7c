"""A log with one of everything: two tenants, trained adapters, a failure, samples, a lease, batches with charges."""

from tests.support import log
from tinkerbell.events import kinds
from tinkerbell.events.kinds import NewEvent, Recorded
from tinkerbell.events.store import EventStore
from tinkerbell.types import LoraConfig


def live(store: EventStore) -> list[Recorded]:
    """Append the whole story; returns the log."""

    def one(new: NewEvent) -> Recorded:
        (recorded,) = store.append(new)
        return recorded

    def ran(batch: str, *charges: tuple[Recorded, int]) -> NewEvent:
        event = kinds.BatchRan(
            batch=batch,
            busy_us=sum(charge for _, charge in charges),
            charges=[(request.position, charge) for request, charge in charges],
        )
        return log.system(event, fence)

    lease = store.acquire_lease("scheduler", "leader", 30)
    assert lease is not None
    fence = (lease.resource, lease.epoch)
    store.append(log.system(log.examples()["environment.recorded"][0], fence))
    configured = kinds.TenantConfigured(weight=2.0, max_adapters=30)
    key = kinds.KeyCreated(key_id="k_one", key_hash="00" * 32)
    store.append(
        NewEvent(event=configured, tenant="alice", stream="tenant/alice"),
        NewEvent(event=key, tenant="alice", stream="tenant/alice"),
        NewEvent(event=kinds.KeyRevoked(key_id="k_one"), tenant="alice", stream="tenant/alice"),
    )
    store.append(
        *(
            NewEvent(event=event, tenant="alice", stream="tenant/alice")
            for event in (
                kinds.SessionStarted(
                    session="se_one", client="tinker/1.2.3", display_name="mine", tags=["a"], user_metadata={"k": "v"}
                ),
                kinds.SamplerCreated(sampler="se_one:sample:0", session="se_one", checkpoint="ck_one"),
                kinds.SamplerJoined(sampler="se_one:sample:0"),
                kinds.SessionHeard(session="se_one"),
                kinds.SessionEnded(session="se_one", reason="success"),
            )
        )
    )
    alice = one(log.add_lora(key="a1", name="mine"))
    bob = one(log.add_lora("ad_bob", "bob", key="a1"))
    lost = one(log.add_lora("ad_lost", "bob"))
    store.append(log.add_lora_completed(alice), log.add_lora_completed(bob), log.failed(lost))
    trained, stepped, saved = store.append(log.forward_backward(key="a2"), log.optim_step(), log.save())
    bobs = one(log.forward_backward("ad_bob", "bob", data=[log.datum(5), log.datum(2)]))
    samples = [one(log.sample()), one(log.sample(None, "bob"))]
    cancelled = kinds.SampleCancelled(request=samples[0].position)
    store.append(NewEvent(event=cancelled, tenant="alice", stream="tenant/alice"))
    units = [kinds.PlannedUnit(trained.position, 0, 1), kinds.PlannedUnit(bobs.position, 0, 2)]
    plan = kinds.BatchPlanned(batch="1.1", lane="train", environment="ef" * 32, units=units, estimated_us=900)
    store.append(log.system(plan, fence))
    store.append(
        ran("1.1", (trained, 600), (bobs, 300)),
        log.forward_backward_completed(trained, cost_us=600, batch="1.1"),
        log.failed(bobs, cost_us=300),
    )
    lost_plan = kinds.BatchPlanned(batch="1.2", lane="control", environment="ef" * 32, units=[], estimated_us=1)
    store.append(log.system(lost_plan, fence), log.system(kinds.BatchLost(batch="1.2", reason="gone"), fence))
    *_, kept = store.append(log.optim_step_completed(stepped, 1), log.save_completed(saved))
    store.append(log.copied(kept))
    store.append(*[log.sample_completed(sample) for sample in reversed(samples)])
    recovery = kinds.CheckpointWritten(
        checkpoint="ck_rec", after_seq=3, step=1, lora=LoraConfig(rank=4), num_bytes=5, state_digest="d1"
    )
    written = NewEvent(
        event=recovery,
        tenant="alice",
        stream="adapter/ad_one",
        adapter="ad_one",
        blobs={"weights": b"12345"},
        fence=fence,
        correlation="trace-1",
    )
    store.append(written)
    changed = kinds.CheckpointChanged(checkpoint="ck_rec", expires_us=2**60, published=True)
    store.append(NewEvent(event=changed, tenant="alice", stream="tenant/alice"))
    gone = one(log.remove_lora("ad_bob", "bob"))
    store.append(log.result(kinds.RemoveLoraCompleted(), gone), log.forward_backward(key="a3"))
    return store.read(limit=10_000)
