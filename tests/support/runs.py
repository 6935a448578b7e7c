"""A run on record: a tenant's adapter trained by a scheduler in this process, beside another tenant's."""

import random
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from tests.support.waiting import PATIENCE_S
from tests.support.waiting import eventually as eventually
from tinkerbell.config import Settings
from tinkerbell.events import kinds
from tinkerbell.events.kinds import Body, ForwardBackwardBody, NewEvent, Recorded, SampleBody
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.service import SchedulerService
from tinkerbell.types import AdamParams, Datum, LoraConfig, LossSpec, OutputSpec, SamplingParams

RUN = "ad_run"
OTHER = "ad_other"
STEPS = 7
SAVED = "ck_saved"


def run_settings(settings: Settings) -> Settings:
    """Small batches and frequent recovery points, all of which stay, so that a short run has some of everything."""
    often = {"checkpoint_every_steps": 3, "recovery_points_kept": 100}
    return msgspec.structs.replace(settings, batch_tokens=64, lease_ttl_s=2.0, **often)


@contextmanager
def serving(store: EventStore, settings: Settings) -> Iterator[SchedulerService]:
    """A scheduler with an executor of its own on this store."""
    service = SchedulerService(store, settings)
    service.start()
    try:
        yield service
    finally:
        service.stop()
    assert service.failed is None


class Asker:
    """Appends one adapter's requests."""

    def __init__(self, store: EventStore, adapter: str, tenant: str) -> None:
        self._store = store
        self._adapter = adapter
        self._tenant = tenant
        self.positions: list[int] = []

    def ask(self, event: kinds.AnyRequest, body: Body | None = None) -> int:
        new = NewEvent(
            event=event, tenant=self._tenant, stream=f"adapter/{self._adapter}", adapter=self._adapter, body=body
        )
        (recorded,) = self._store.append(new)
        self.positions.append(recorded.position)
        return recorded.position

    def add_lora(self, seed: int = 1, rank: int = 2) -> int:
        lora = LoraConfig(rank=rank)
        return self.ask(kinds.AddLoraRequested(base_model="fake", lora=lora, seed=seed, name=self._adapter[3:]))

    def train(self, data: list[Datum], *, backward: bool = True, loss: str = "cross_entropy") -> int:
        cls = kinds.ForwardBackwardRequested if backward else kinds.ForwardRequested
        tokens = sum(datum.num_tokens for datum in data)
        event = cls(loss=LossSpec(name=loss), num_datums=len(data), num_tokens=tokens, chunk_tokens=16)
        if isinstance(event, kinds.ForwardRequested):
            event = msgspec.structs.replace(event, outputs=OutputSpec(entropy=True, top_k=3))
        return self.ask(event, ForwardBackwardBody(data=data))

    def step(self, learning_rate: float = 0.05) -> int:
        return self.ask(kinds.OptimStepRequested(adam=AdamParams(learning_rate=learning_rate)))

    def sample(self) -> int:
        params = SamplingParams(
            max_tokens=6, num_samples=12, prompt_logprobs=True, top_logprobs=2, prompt_top_logprobs=2
        )
        return self.ask(kinds.SampleRequested(params=params, num_tokens=2), SampleBody(ints(1, 2), ints(3, -1, 4, 5)))

    def wait(self, timeout_s: float = PATIENCE_S) -> list[Recorded]:
        """The results of everything asked, in the order of asking."""
        deadline = time.monotonic() + timeout_s
        found: list[Recorded] = []
        for position in self.positions:
            while (row := self._store.queries.future(self._tenant, position)) is None or row.result_position is None:
                assert time.monotonic() < deadline, f"no answer to {position}"
                time.sleep(0.005)
            result = self._store.get(row.result_position)
            assert result is not None
            found.append(result)
        return found


def ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def data(seed: int, lengths: tuple[int, ...] = (5, 9, 3, 21)) -> list[Datum]:
    """Several chunks of 16 tokens, and a datum that is longer than a chunk."""
    draw = random.Random(seed)
    rows = [[draw.randrange(1, 256) for _ in range(length + 1)] for length in lengths]
    return [Datum(ints(*row[:-1]), ints(*row[1:]), {}) for row in rows]


def rewarded(datum: Datum) -> Datum:
    """With what importance_sampling reads."""
    n = datum.num_tokens
    inputs = {"logprobs": struct.pack(f"<{n}f", *[-5.0] * n), "advantages": struct.pack(f"<{n}f", *[0.5] * n)}
    return Datum(datum.tokens, datum.targets, inputs)


def train(store: EventStore, adapter: str, tenant: str, *, steps: int = STEPS, load: bool = True) -> Asker:
    """Ask for a run with every kind of request."""
    asker = Asker(store, adapter, tenant)
    asker.add_lora(seed=len(adapter))
    asker.step()  # there is no gradient: the caller's mistake is part of the run
    for step in range(steps):
        asker.train(data(step))
        asker.train([rewarded(datum) for datum in data(100 + step, (4, 6))], loss="importance_sampling")
        asker.step()
        if step == 2:
            asker.sample()
            asker.ask(kinds.SaveRequested(checkpoint=f"{SAVED}_{tenant}"))
        if step == 4 and load:
            asker.ask(kinds.LoadRequested(checkpoint=f"{SAVED}_{tenant}"))
        asker.train(data(200 + step), backward=False)
    return asker


def record(store: EventStore, settings: Settings, *, load: bool = True) -> None:
    """Two tenants at once: RUN of alice and OTHER of bob."""
    with serving(store, settings):
        for asker in (train(store, RUN, "alice", load=load), train(store, OTHER, "bob", load=load)):
            asker.wait()
