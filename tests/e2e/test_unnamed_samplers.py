"""A loop of reinforcement learning that makes a fresh sampler at every step: what it leaves behind is bounded."""

import msgspec
import pytest

from tests.support.runs import Asker, data, eventually, run_settings, serving
from tinkerbell.config import Settings
from tinkerbell.errors import NotFound
from tinkerbell.events import kinds
from tinkerbell.events.kinds import NewEvent
from tinkerbell.events.sessions import end
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler import sampler_expiry
from tinkerbell.scheduler.service import SchedulerService
from tinkerbell.types import LoraConfig, is_sampler

SESSION = "se_" + "a" * 20
STEPS = 12
KEPT = 2
IN_MEMORY = 3
WEIGHT_BYTES = 4 * 2 * 16 * 2
"""Of an adapter of rank 2 of the fake executor."""


def say(store: EventStore, event: kinds.AnyEvent) -> None:
    store.append(NewEvent(event=event, tenant="alice", stream="tenant/alice"))


def held(service: SchedulerService) -> int:
    """Samplers in the executor."""
    assert service._leader is not None
    return sum(is_sampler(resident.adapter) for resident in service._leader._residency.by_use())


def files(settings: Settings) -> set[str]:
    return {path.name for path in settings.blob_dir.rglob("*") if path.is_file()}


def test_a_fresh_sampler_each_step_leaves_bounded_bytes_behind(
    store: EventStore, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_expiry, "EVERY_S", 0.2)
    settings = msgspec.structs.replace(
        run_settings(database_settings),
        checkpoint_every_steps=1000,
        max_sampler_bytes=IN_MEMORY * WEIGHT_BYTES,
        unnamed_samplers_kept=KEPT,
        unnamed_sampler_idle_s=0.05,
    )
    say(store, kinds.SessionStarted(session=SESSION, client="test"))
    with serving(store, settings) as service:
        model = Asker(store, f"{SESSION}:train:0", "alice")
        model.add_lora()
        samplers: list[Asker] = []

        def sampler(number: int, name: str | None = None) -> None:
            id, checkpoint = f"{SESSION}:sample:{number}", f"ck_{number}"
            say(store, kinds.SamplerCreated(sampler=id, session=SESSION, checkpoint=checkpoint))
            unnamed = None if name else id
            model.ask(kinds.SaveRequested(checkpoint=checkpoint, name=name, use="sampler", sampler=unnamed))
            model.wait()
            policy = Asker(store, id, "alice")
            samplers.append(policy)
            lora = LoraConfig(rank=2)
            policy.ask(kinds.AddLoraRequested(base_model="fake", lora=lora, seed=0, checkpoint=checkpoint))
            policy.sample()
            assert isinstance(policy.wait()[-1].event, kinds.SampleCompleted)

        sampler(100, "kept")
        named = {digest for event in store.read(0, types=["save.completed"]) for digest in event.blobs.values()}
        assert len(named) == 2, "weights and their description, no moments"
        for step in range(STEPS):
            model.train(data(step, (5, 4)))
            model.step()
            sampler(step)
            eventually(lambda: held(service) <= IN_MEMORY)

        def mine() -> list[str]:
            return [row.sampler for row in store.queries.sampler_weights()]

        newest = [f"{SESSION}:sample:{step}" for step in range(STEPS - KEPT, STEPS)]
        eventually(lambda: mine() == newest)
        eventually(lambda: len(files(settings)) == len(named) + 2 * KEPT)
        # What left the executor is there when it is wanted, and what is gone says so.
        samplers[-1].sample()
        samplers[0].sample()
        for policy in (samplers[-1], samplers[0]):
            assert isinstance(policy.wait()[-1].event, kinds.SampleCompleted)
        with pytest.raises(NotFound):
            samplers[1].sample()
        store.check()

        end(store, "alice", SESSION, "over", None)
        eventually(lambda: mine() == [] and files(settings) == named)
        eventually(lambda: held(service) == 0)
    store.check()
