"""An adapter runs beside the base model it was trained on and beside no other, whichever way it comes to be there."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support import runs
from tests.support.runs import Asker, serving
from tests.support.tiny_model import write_tiny_model
from tinkerbell.cli.main import run as command_line
from tinkerbell.config import Settings
from tinkerbell.errors import OtherBaseModel
from tinkerbell.events import kinds
from tinkerbell.events.store import EventStore
from tinkerbell.executors.fake import FakeExecutor
from tinkerbell.executors.hf import model as hf_model
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.replay import DatabaseLog, ExecutorChoice, fork, state_at, verify
from tinkerbell.types import LoraConfig

SMALL = {"vocab_size": "128"}


class Owner(Asker):
    """Whose adapter says which weights it is for, as one that came through an API does."""

    def __init__(self, store: EventStore, adapter: str, tenant: str, base_hash: str = "") -> None:
        super().__init__(store, adapter, tenant)
        self.base_hash = base_hash

    def make(self, checkpoint: str | None = None) -> int:
        event = kinds.AddLoraRequested(
            base_model="fake",
            base_hash=self.base_hash,
            lora=LoraConfig(rank=2),
            seed=1,
            checkpoint=checkpoint,
            with_optimizer=checkpoint is not None,
        )
        return self.ask(event)

    def step_on(self) -> None:
        self.train(runs.data(1, (4,)))
        self.step()

    def digest(self) -> str | None:
        row = self._store.queries.adapter(self._tenant, self._adapter)
        assert row is not None
        return row.state_digest

    def answers(self, *positions: int) -> list[kinds.AnyEvent]:
        found = {each.causation: each.event for each in self.wait()}
        return [found[position] for position in positions or self.positions]


def refused(events: Sequence[kinds.AnyEvent], *hashes: str) -> None:
    assert events
    for event in events:
        assert isinstance(event, kinds.Failed), event
        assert (event.category, event.code) == ("user", "other-base-model")
        assert all(f"fake (hash {each[:16]})" in event.message for each in hashes), event.message


def hash_of(**extra: str) -> str:
    return FakeExecutor(ExecutorOptions(extra=extra)).describe().model.hash


@pytest.mark.parametrize("old", [False, True], ids=["recorded", "of an older release"])
def test_another_model_refuses_the_adapter_and_nobody_else(
    database_settings: Settings, store: EventStore, old: bool
) -> None:
    large, small = hash_of(), hash_of(**SMALL)
    assert large != small
    settings = runs.run_settings(database_settings)
    mine = Owner(store, "ad_mine", "alice", "" if old else large)
    with serving(store, settings):
        mine.make()
        mine.step_on()
        mine.ask(kinds.SaveRequested(checkpoint="ck_mine"))
        mine.train(runs.data(2, (5,)))  # a gradient that the step below must not clear
        mine.wait()
    digest = mine.digest()

    other = msgspec.structs.replace(settings, executor_options=SMALL)
    with serving(store, other):
        before = len(mine.positions)
        mine.step_on()
        mine.sample()
        mine.ask(kinds.SaveRequested(checkpoint="ck_more"))
        mine.ask(kinds.LoadRequested(checkpoint="ck_mine"))
        refused(mine.answers(*mine.positions[before:]), large, small)
        neighbour = Owner(store, "ad_new", "alice", small)
        neighbour.make()
        neighbour.train(small_data())
        neighbour.step()
        assert not any(isinstance(each, kinds.Failed) for each in neighbour.answers())
        refused(neighbour.answers(neighbour.ask(kinds.LoadRequested(checkpoint="ck_mine"))), large, small)
        copy = Owner(store, "ad_copy", "alice", small)
        refused(copy.answers(copy.make("ck_mine")), large, small)

    with serving(store, settings):
        assert mine.digest() == digest
        before = len(mine.positions)
        mine.step_on()
        mine.ask(kinds.LoadRequested(checkpoint="ck_mine"))
        mine.ask(kinds.RemoveLoraRequested())
        assert not any(isinstance(each, kinds.Failed) for each in mine.answers(*mine.positions[before:]))
        refused(neighbour.answers(neighbour.ask(kinds.SaveRequested(checkpoint="ck_new"))), large, small)
    store.check()


def small_data() -> list[kinds.Datum]:
    return [kinds.Datum(runs.ints(1, 2, 3), runs.ints(2, 3, 4), {})]


def test_an_adapter_asked_for_under_one_model_is_not_made_under_another(
    settings: Settings, sqlite_store: EventStore
) -> None:
    asked = Owner(sqlite_store, "ad_asked", "alice", hash_of())
    asked.make()
    with serving(sqlite_store, msgspec.structs.replace(runs.run_settings(settings), executor_options=SMALL)):
        refused(asked.answers(), hash_of(), hash_of(**SMALL))


def test_no_weights_come_of_a_run_beside_another_model(
    settings: Settings, sqlite_store: EventStore, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = runs.run_settings(settings)
    mine = Owner(sqlite_store, runs.RUN, "alice", hash_of())
    with serving(sqlite_store, settings):
        mine.make()
        mine.step_on()
        mine.wait()
    choice = ExecutorChoice(options=SMALL)
    with closing(DatabaseLog.open(settings)) as log:
        assert verify(log, runs.RUN, choice=choice).verdict == "diverged"
        for again in (
            lambda: state_at(log, runs.RUN, "step:1", choice=choice),
            lambda: fork(log, runs.RUN, "step:1", {"learning_rate": "0.1"}, choice=choice),
        ):
            with pytest.raises(OtherBaseModel, match="serve the first"):
                again()
    where = ["--data-dir", settings.data_dir, "--executor-option", "vocab_size=128"]
    out = str(Path(settings.data_dir) / "out")
    assert command_line(["replay", "state", runs.RUN, "--at", "step:1", "--out", out, *where]) == 2
    assert hash_of(**SMALL)[:16] in capsys.readouterr().err


def test_a_hash_names_what_a_model_computes(tmp_path: Path) -> None:
    """Not its place, its name or the dtype it is loaded in; its weights, and how its config has them used."""
    ours = load(write_tiny_model(tmp_path / "a"))
    assert load(write_tiny_model(tmp_path / "elsewhere", max_position_embeddings=256)) == ours
    for number, other in enumerate(({"seed": 1}, {"rms_norm_eps": 1e-3}, {"rope_parameters": rope(500.0)})):
        assert load(write_tiny_model(tmp_path / str(number), **other)) != ours, other
    slightly = write_tiny_model(tmp_path / "slightly")
    change_one_weight(slightly)
    assert load(slightly) != ours


def rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def load(directory: Path, dtype: str = "float32") -> str:
    return hf_model.load(str(directory), dtype=dtype, device="cpu").info.hash


def change_one_weight(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 1e-4
    save_file(tensors, file, metadata={"format": "pt"})
