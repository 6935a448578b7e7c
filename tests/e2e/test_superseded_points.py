"""A run whose recovery points were superseded while it went on: it is restored, verified, forked and exported."""

from pathlib import Path

import msgspec
import pytest

from tests.support.runs import RUN, Asker, data, eventually, serving
from tinkerbell.config import Settings
from tinkerbell.events import kinds
from tinkerbell.events.store import EventStore
from tinkerbell.replay.archive import ArchiveLog, export
from tinkerbell.replay.log import DatabaseLog
from tinkerbell.replay.state import state_at
from tinkerbell.replay.verify import verify
from tinkerbell.scheduler import superseding

STEPS = 12
KEPT = 2


@pytest.fixture
def trained(store: EventStore, database_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of two lives with a recovery point after each step; its digests by step."""
    monkeypatch.setattr(superseding, "EVERY_S", 0.2)
    settings = msgspec.structs.replace(database_settings, checkpoint_every_steps=1, recovery_points_kept=KEPT)
    asker = Asker(store, RUN, "alice")
    asker.add_lora()
    for life in range(2):
        with serving(store, settings):
            for step in range(STEPS // 2):
                asker.train(data(10 * life + step, (5, 4)))
                asker.step()
                asker.wait()
            eventually(lambda: 0 < len(store.queries.recovery_points()) <= KEPT)
    steps = [each.event for each in asker.wait() if isinstance(each.event, kinds.OptimStepCompleted)]
    return [step.state_digest for step in steps]


def test_a_run_goes_on_and_is_replayed_from_what_is_left(
    trained: list[str], store: EventStore, database_settings: Settings, tmp_path: Path
) -> None:
    written = store.read(0, types=["checkpoint.written"])
    assert len(trained) == STEPS and len(written) > 2 * KEPT
    points = store.queries.recovery_points()
    here = {path.name for path in database_settings.blob_dir.rglob("*") if path.is_file()}
    assert here == {digest for point in points for digest in point.blobs.values()}
    assert store.check().num_removed == len(written) - len(points)

    database = DatabaseLog.open(database_settings)
    try:
        report = verify(database, RUN)
        assert (report.verdict, report.begun_at_step, report.findings) == ("equal", 0, [])
        # From where a point was, and from one that is there.
        for at in (2, STEPS - 1):
            found = state_at(database, RUN, f"step:{at}")
            assert (found.step, found.state.digest, found.findings) == (at, trained[at - 1], [])
        export(database, RUN, tmp_path / "run.zip")
    finally:
        database.close()
    archive = ArchiveLog.open(tmp_path / "run.zip")
    try:
        assert len(archive.manifest.superseded) == len(written) - len(points)
        assert verify(archive, RUN).verdict == "equal"
    finally:
        archive.close()
