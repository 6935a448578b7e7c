"""What else a log is good for: the state at any place, a fork, the difference of two runs, a run in a file."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support import runs
from tests.support.server import client_of, fake_server
from tinkerbell import replay
from tinkerbell.cli.main import run as command_line
from tinkerbell.config import Settings
from tinkerbell.errors import Conflict, Corrupt, InvalidRequest, NotFound
from tinkerbell.events import envelope, kinds
from tinkerbell.events.store import EventStore
from tinkerbell.replay import ArchiveLog, DatabaseLog
from tinkerbell.replay.log import blob_of
from tinkerbell.sdk import Datum
from tinkerbell.types import LoraConfig

FORKED = "ad_forked"
"""Of alice: trained like RUN up to step 3, then with another learning rate; no load in it."""
CHILD = "ad_child"
"""Made from a checkpoint that OTHER saved."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Settings:
    directory = tmp_path_factory.mktemp("recorded")
    shutil.copyfile(sqlite_template, directory / "tinkerbell.db")
    settings = runs.run_settings(Settings(data_dir=str(directory), executor="fake"))
    with closing(EventStore.open(settings)) as store:
        runs.record(store, settings, load=False)
        with runs.serving(store, settings):
            forked = runs.Asker(store, FORKED, "alice")
            forked.add_lora(seed=len(runs.RUN))
            forked.step()
            for step in range(runs.STEPS):
                forked.train(runs.data(step))
                rewarded = [runs.rewarded(datum) for datum in runs.data(100 + step, (4, 6))]
                forked.train(rewarded, loss="importance_sampling")
                forked.step(0.05 if step < 3 else 0.5)
            forked.wait()
            made = kinds.AddLoraRequested(
                base_model="fake", lora=LoraConfig(rank=2), seed=0, checkpoint=f"{runs.SAVED}_bob", with_optimizer=True
            )
            child = runs.Asker(store, CHILD, "bob")
            child.ask(made)
            child.train(runs.data(50))
            child.step()
            child.wait()
    return settings


@pytest.fixture
def log(recorded: Settings) -> Iterator[DatabaseLog]:
    opened = DatabaseLog.open(recorded)
    yield opened
    opened.close()


def answers(log: replay.Log, run: str, type_: str) -> list[kinds.AnyEvent]:
    return [each.recorded.event for each in log.entries(adapter=run, types=[type_])]


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
def test_the_state_after_any_step(log: DatabaseLog, step: int) -> None:
    stepped = answers(log, runs.RUN, "optim_step.completed")[step - 1]
    assert isinstance(stepped, kinds.OptimStepCompleted)
    found = replay.state_at(log, runs.RUN, f"step:{step}")
    assert (found.step, found.state.digest) == (step, stepped.state_digest)
    assert not found.findings and not found.differences
    assert found.num_executed <= 9, "begun at the newest saved state, not at the beginning"
    by_seq = replay.state_at(log, runs.RUN, str(found.seq + 1))
    assert by_seq.state == found.state, "the forward_backward after it changes no weights"


def test_a_saved_state_is_the_checkpoint_itself(log: DatabaseLog, tmp_path: Path) -> None:
    (saved,) = [each.recorded for each in log.entries(adapter=runs.RUN, types=["save.completed"])]
    found = replay.state_at(log, runs.RUN, "step:3")
    files = replay.write_adapter(found.state, tmp_path / "adapter", with_optimizer=True)
    assert {file.name for file in files} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.safetensors",
    }
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == blob_of(log, saved.blobs["weights"])
    assert (tmp_path / "adapter" / "adapter_config.json").read_bytes() == blob_of(log, saved.blobs["adapter_config"])


def test_of_an_adapter_made_from_anothers_checkpoint(log: DatabaseLog) -> None:
    found = replay.state_at(log, CHILD, "0")
    assert found.step == 3
    assert replay.verify(log, CHILD).verdict == "equal"


def test_a_name_that_two_runs_have_is_none(recorded: Settings) -> None:
    with closing(EventStore.open(recorded)) as store:
        for run in ("ad_x1", "ad_x2"):
            asked = kinds.AddLoraRequested(base_model="fake", lora=LoraConfig(), seed=1, name="twice")
            runs.Asker(store, run, "dave").ask(asked)
    with closing(DatabaseLog.open(recorded)) as log:
        with pytest.raises(InvalidRequest, match="2 runs are called twice: say which of ad_x1, ad_x2"):
            replay.diff(log, "twice", log, runs.RUN)
        with pytest.raises(NotFound, match="was never made"):
            replay.verify(log, "ad_x1")


# ---- fork ------------------------------------------------------------------------------------------------------------


def test_a_fork_is_what_the_server_would_have_done(log: DatabaseLog) -> None:
    """A run that was really trained with another learning rate from step 4 on comes to the same bits."""
    made = replay.fork(log, runs.RUN, "step:3", {"learning_rate": "0.5"})
    assert made.at_step == 3 and made.num_executed_before == 0, "a checkpoint holds the past"
    assert [point.step for point in made.past] == [1, 2, 3]
    assert [point.step for point in made.points] == [4, 5, 6, 7]
    assert made.points[0].replayed == made.points[0].recorded, "before the first step with another rate"
    assert all(point.replayed != point.recorded for point in made.points[1:])
    truth = replay.verify(log, FORKED)
    assert truth.verdict == "equal"
    assert [point.replayed for point in made.points] == [point.recorded for point in truth.points[3:]]
    stepped = answers(log, FORKED, "optim_step.completed")[-1]
    assert isinstance(stepped, kinds.OptimStepCompleted)
    assert made.state is not None and made.state.digest == stepped.state_digest


def test_a_fork_with_the_same_settings_is_the_run(log: DatabaseLog) -> None:
    made = replay.fork(log, runs.RUN, "step:5", {"learning_rate": "0.05"}, until="step:6")
    assert [point.step for point in made.points] == [6]
    assert made.points[0].recorded == made.points[0].replayed
    # The past since the newest saved state is executed, once.
    assert 0 < made.num_executed_before < 10


@pytest.mark.parametrize(
    ("settings", "options", "match"),
    [
        ({"nothing": "1"}, {}, "cannot be changed; what can: learning_rate"),
        ({"learning_rate": "much"}, {}, "learning_rate=much"),
        ({"learning_rate": "-1"}, {}, "learning_rate=-1"),
        ({"learning_rate": "1"}, {"until": "step:2"}, "not after"),
    ],
)
def test_what_cannot_be_forked(log: DatabaseLog, settings: dict[str, str], options: dict[str, str], match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        replay.fork(log, runs.RUN, "step:3", settings, **options)


# ---- diff ------------------------------------------------------------------------------------------------------------


def test_two_runs_part_where_they_were_asked_differently(log: DatabaseLog) -> None:
    found = replay.diff(log, FORKED, log, CHILD)
    assert found.first_request is not None
    assert (found.first_request.seq, found.first_request.kind) == (0, "add_lora")
    found = replay.diff(log, runs.RUN, log, runs.OTHER)
    assert found.first_request is not None and found.first_request.field == "seed"
    assert found.first_state == 1
    assert [setting.name for setting in found.settings] == ["seed"]
    assert [point.step for point in found.points] == list(range(1, 8))
    assert [point.a == point.b for point in found.points] == [True] + 6 * [False], "a fresh adapter is the base model"
    same = replay.diff(log, runs.RUN, log, runs.RUN)
    assert same.first_request is None and same.first_state is None and not same.settings


def test_data_that_differs_is_named_to_the_token(recorded: Settings) -> None:
    with closing(EventStore.open(recorded)) as store:
        for run, last in (("ad_left", 7), ("ad_right", 8)):
            asker = runs.Asker(store, run, "carol")
            asker.ask(kinds.AddLoraRequested(base_model="fake", lora=LoraConfig(), seed=1))
            first, second = runs.data(1, (3, 4))
            changed = msgspec.structs.replace(second, tokens=second.tokens[:-4] + runs.ints(last))
            asker.train([first, changed])
    with closing(DatabaseLog.open(recorded)) as log:
        found = replay.diff(log, "ad_left", log, "ad_right").first_request
    assert found is not None
    assert (found.seq, found.field, found.a, found.b) == (1, "data[1].tokens[3]", "7", "8")


# ---- export and import -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [runs.RUN, CHILD])
def test_a_run_travels_in_a_file(recorded: Settings, tmp_path: Path, run: str) -> None:
    """Verified without the server's database and blobs: from the file, and from a directory."""
    file, again, directory = tmp_path / "run.zip", tmp_path / "again.zip", tmp_path / "run"
    with closing(DatabaseLog.open(recorded)) as log:
        here = replay.verify(log, run)
        replay.export(log, run, file)
        replay.export(log, run, again)
    assert file.read_bytes() == again.read_bytes(), "the same run is the same file"
    manifest = replay.unpack(file, directory)
    assert manifest.run == run
    for path in (file, directory):
        with closing(ArchiveLog.open(path)) as archive:
            there = replay.verify(archive, manifest.run)
        assert msgspec.structs.replace(there, log=here.log, took_s=here.took_s) == here
        assert here.verdict == "equal"
    other = replay.ArchiveLog.open(file)
    assert {each.recorded.adapter for each in other.entries()} <= {run, None, runs.OTHER if run == CHILD else None}
    other.close()


@pytest.fixture
def archive(recorded: Settings, tmp_path: Path) -> Path:
    file = tmp_path / "run.zip"
    with closing(DatabaseLog.open(recorded)) as log:
        replay.export(log, runs.RUN, file)
    return file


def test_a_changed_archive_is_noticed(archive: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    replay.unpack(archive, directory)
    body = next(directory.glob("bodies/*"))
    body.write_bytes(b"x" + body.read_bytes()[1:])
    with closing(ArchiveLog.open(directory)) as log:
        report = replay.verify(log, runs.RUN)
    assert report.verdict == "diverged" and report.findings[0].what == "body"
    # With the manifest changed, too, the event's own hash of its body still tells.
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][f"bodies/{body.name}"] = hashlib.sha256(body.read_bytes()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with closing(ArchiveLog.open(directory)) as log:
        report = replay.verify(log, runs.RUN)
    assert report.findings[0].what == "body"
    assert report.findings[0].position == int(body.name)
    events = directory / "events.jsonl"
    events.write_bytes(events.read_bytes().replace(b"0.05", b"0.06", 1))
    with pytest.raises(Corrupt, match=r"events\.jsonl has other bytes"):
        ArchiveLog.open(directory)


def _rewritten(archive: Path, to: Path, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    """The archive with other events, and a manifest that says so."""
    with zipfile.ZipFile(archive) as source:
        files = {name: source.read(name) for name in source.namelist()}
    rows = [json.loads(line) for line in files["events.jsonl"].splitlines()]
    change(rows)
    files["events.jsonl"] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    manifest = json.loads(files["manifest.json"])
    manifest["files"]["events.jsonl"] = hashlib.sha256(files["events.jsonl"]).hexdigest()
    manifest["num_events"] = len(rows)
    files["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(to, "w") as target:
        for name, data in files.items():
            target.writestr(name, data)
    return to


@pytest.mark.parametrize(
    "column", [{"hash": None}, {"prev_hash": None}, {"position": "x"}, {"stream_version": None}, {"adapter": 7}]
)
def test_events_with_other_types_are_no_events(archive: Path, tmp_path: Path, column: dict[str, Any]) -> None:
    changed = _rewritten(archive, tmp_path / "changed.zip", lambda rows: rows[3]["columns"].update(column))
    with pytest.raises(Corrupt, match=f"cannot be read.*{next(iter(column))}"):
        ArchiveLog.open(changed)


@pytest.mark.parametrize("offset", [100, 500])
def test_a_flipped_byte_is_no_accident(archive: Path, tmp_path: Path, offset: int) -> None:
    with zipfile.ZipFile(archive) as source:
        at = source.getinfo("events.jsonl").header_offset + offset
    raw = bytearray(archive.read_bytes())
    raw[at] ^= 0xFF
    flipped = tmp_path / "flipped.zip"
    flipped.write_bytes(raw)
    with pytest.raises(Corrupt, match=r"events\.jsonl (cannot be read|has other bytes)"):
        ArchiveLog.open(flipped)
    directory = tmp_path / "there"
    with pytest.raises(Corrupt):
        replay.unpack(flipped, directory)
    assert not directory.exists() and not list(tmp_path.glob(".there*"))
    replay.unpack(archive, directory)


def test_an_archive_that_was_cut_off_is_told_by_its_head(archive: Path, tmp_path: Path) -> None:
    """Nothing within it can tell: all of it may have been written anew."""
    with closing(ArchiveLog.open(archive)) as log:
        head = log.manifest.head
        assert replay.verify(log, runs.RUN, head=head).verdict == "equal"

    def cut(rows: list[dict[str, Any]]) -> None:
        stepped = [row["columns"]["position"] for row in rows if row["columns"]["type"] == "optim_step.completed"]
        rows[:] = [row for row in rows if row["columns"]["position"] <= stepped[1] or row["columns"]["adapter"] is None]

    with closing(ArchiveLog.open(_rewritten(archive, tmp_path / "cut.zip", cut))) as log:
        assert replay.verify(log, runs.RUN).verdict == "equal"
        report = replay.verify(log, runs.RUN, head=head)
    assert report.verdict == "diverged" and report.findings[0].recorded == head


def test_a_foreign_checkpoint_is_checked_by_its_own_hash(recorded: Settings, tmp_path: Path) -> None:
    file = tmp_path / "child.zip"
    with closing(DatabaseLog.open(recorded)) as log:
        replay.export(log, CHILD, file)

    def forge(rows: list[dict[str, Any]]) -> None:
        (saved,) = [row["columns"] for row in rows if row["columns"]["type"] == "save.completed"]
        saved["actor"] = "mallory"

    with closing(ArchiveLog.open(_rewritten(file, tmp_path / "forged.zip", forge))) as log:
        report = replay.verify(log, CHILD)
    assert report.verdict == "diverged" and report.findings[0].what == "chain"


def test_an_archive_has_the_keys_of_its_own_bytes_only(recorded: Settings, archive: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    manifest = replay.unpack(archive, directory)
    stored = {name: (directory / name).read_bytes() for name in manifest.files if name != "events.jsonl"}
    assert stored and all(map(envelope.is_envelope, stored.values()))
    assert set(manifest.keys) == {hashlib.sha256(data).hexdigest() for data in stored.values()}
    assert len(set(manifest.keys.values())) == len(manifest.keys) and manifest.version == 2
    (name, other), *_ = ((name, data) for name, data in stored.items())
    text = json.loads((directory / "manifest.json").read_text())
    digest = hashlib.sha256(other).hexdigest()
    for key in (None, next(value for at, value in manifest.keys.items() if at != digest)):
        text["keys"].pop(digest, None)
        if key is not None:
            text["keys"][digest] = key
        (directory / "manifest.json").write_text(json.dumps(text))
        with closing(ArchiveLog.open(directory)) as log:
            report = replay.verify(log, runs.RUN)
        assert report.verdict == "diverged" and report.findings[0].what == "body", name


def test_what_is_no_archive(archive: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.zip"
    other.write_bytes(b"nothing")
    with pytest.raises(InvalidRequest, match="not an exported run"):
        ArchiveLog.open(other)
    with zipfile.ZipFile(other, "w") as empty:
        empty.writestr("readme", "nothing")
    with pytest.raises(InvalidRequest, match="not an exported run"):
        ArchiveLog.open(other)
    with zipfile.ZipFile(archive) as good:
        manifest = json.loads(good.read("manifest.json"))
    for change, match in (
        ({"version": 99}, "version 99"),
        ({"files": {**manifest["files"], "../evil": "00" * 32}}, "unexpected name"),
    ):
        with zipfile.ZipFile(other, "w") as bad:
            bad.writestr("manifest.json", json.dumps({**manifest, **change}))
        with pytest.raises(InvalidRequest, match=match):
            replay.unpack(other, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "evil").exists()
    with closing(ArchiveLog.open(archive)) as log:
        with pytest.raises(Conflict):
            replay.export(log, runs.RUN, archive)
        with pytest.raises(NotFound):
            replay.verify(log, "ad_other")
    with pytest.raises(Conflict):
        replay.unpack(archive, tmp_path)


# ---- the commands ----------------------------------------------------------------------------------------------------


def test_the_commands(recorded: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--data-dir", recorded.data_dir]
    file, out = str(tmp_path / "run.zip"), str(tmp_path / "out")

    def said(*arguments: str, status: int = 0) -> str:
        assert command_line(["replay", *arguments]) == status
        return capsys.readouterr().out

    assert {row["name"] for row in json.loads(said("runs", *where, "--json", "--tenant", "alice"))} == {"run", "forked"}
    assert runs.OTHER in said("runs", *where)
    assert f"run {runs.RUN}" in said("export", "run", "--out", file, *where)
    assert json.loads(said("import", file, out, "--json"))["run"] == runs.RUN
    plot = tmp_path / "losses.png"
    report = json.loads(said("verify", out, "--json", "--plot", str(plot)))
    assert (report["verdict"], report["findings"]) == ("equal", [])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "every bit as recorded up to step 7" in said("verify", file)
    adapter = tmp_path / "adapter"
    found = json.loads(said("state", "run", "--at", "step:2", "--out", str(adapter), *where, "--json"))
    assert found["step"] == 2 and (adapter / "adapter_model.safetensors").exists()
    page, forked = tmp_path / "fork.html", tmp_path / "fork"
    text = said("fork", file, "--at", "step:2", "--set", "learning_rate=0.5", "--out", str(forked), "--plot", str(page))
    assert "loss of the fork" in text and "<svg" in page.read_text()
    assert json.loads((forked / "fork.json").read_text())["at_step"] == 2
    assert "first difference: add_lora at seq 0, seed" in said("diff", "run", runs.OTHER, *where, status=1)
    assert "The same was asked of both" in said("diff", "run", file, *where)
    assert command_line(["replay", "fork", "run", "--at", "step:2", "--set", "speed=1", "--out", out, *where]) == 2
    assert "speed" in capsys.readouterr().err


def test_a_fork_on_the_running_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new adapter in the log, which comes to the same bits as the fork beside the log; it trains on."""
    environment = {"TINKERBELL_CHUNK_TOKENS": "16", "TINKERBELL_CHECKPOINT_EVERY_STEPS": "2"}
    rows = [
        Datum(tokens=[step + i for i in range(1, 9)], targets=[step + i for i in range(2, 10)]) for step in range(12)
    ]
    with fake_server(tmp_path, environment=environment) as server, client_of(server) as client:
        run = client.add_lora(rank=2, seed=5, name="run")
        futures = []
        for step in range(6):
            run.forward_backward(rows[step : step + 4])
            futures.append(run.optim_step(learning_rate=0.1))
            if step == 1:
                saved = run.save()
        futures[-1].result()
        where = ["--data-dir", str(tmp_path), "--json"]
        arguments = ["replay", "fork", "run", "--at", "step:3", "--set", "learning_rate=0.3", *where]
        assert command_line([*arguments, "--url", server.url, "--name", "fork"]) == 0
        online = json.loads(capsys.readouterr().out)
        assert command_line([*arguments, "--out", str(tmp_path / "out")]) == 0
        offline = json.loads(capsys.readouterr().out)
        for field in ("past", "points", "at_step", "seq", "changed"):
            assert online[field] == offline[field], field
        assert [point["step"] for point in online["points"]] == [4, 5, 6]
        # Steps 1 and 2 are in the checkpoint; step 3 was executed once more.
        assert online["checkpoint"] == saved.result().checkpoint_id and online["num_executed_before"] == 2
        forked = client.adapter(online["adapter"])
        assert forked.info().name == "fork" and forked.info().step == 6
        assert forked.run().points[-1].state_digest == offline["state_digest"] != run.run().points[-1].state_digest
        forked.forward_backward(rows[:2])
        assert forked.optim_step().result().step == 7
        assert command_line(["replay", "verify", "fork", "--data-dir", str(tmp_path)]) == 0
        capsys.readouterr()
        assert command_line([*arguments]) == 2
        assert "either --out" in capsys.readouterr().err


def test_a_server_that_cuts_otherwise_does_not_fork(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The past comes to other bits there, which is said before anything else is sent."""
    rows = [Datum(tokens=[7 * n + i for i in range(1, 9)], targets=[5 * n + i for i in range(2, 10)]) for n in range(8)]
    with (
        fake_server(tmp_path, environment={"TINKERBELL_CHUNK_TOKENS": "64", "TINKERBELL_LEASE_TTL_S": "1"}) as server,
        client_of(server) as client,
    ):
        run = client.add_lora(rank=2, seed=5, name="run")
        for _ in range(3):
            run.forward_backward(rows)
            last = run.optim_step(learning_rate=0.1)
        last.result()
    with fake_server(tmp_path, environment={"TINKERBELL_CHUNK_TOKENS": "24", "TINKERBELL_LEASE_TTL_S": "1"}) as server:
        arguments = ["--at", "step:2", "--set", "learning_rate=0.3", "--url", server.url, "--data-dir", str(tmp_path)]
        assert command_line(["replay", "fork", "run", *arguments, "--json"]) == 1
        said = json.loads(capsys.readouterr().out)
        assert said["findings"] and said["points"] == []
        with client_of(server) as client:
            assert client.adapter(said["adapter"]).info().step == 2


@pytest.mark.parametrize("place", ["\u00b2", "9" * 5000, "step:\u0663", "-1", "", "step:"])
def test_what_is_no_place(log: DatabaseLog, place: str) -> None:
    with pytest.raises(InvalidRequest, match="neither SEQ"):
        replay.state_at(log, runs.RUN, place)
