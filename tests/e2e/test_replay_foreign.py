"""What an exported run from somebody else may decide of whoever reads it, and what it may cost."""

import ast
import copy
import hashlib
import io
import json
import os
import random
import shutil
import stat
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import pytest

import tinkerbell
from tests.e2e.test_replay_uses import _rewritten
from tests.support import runs
from tinkerbell import replay
from tinkerbell.cli.main import run as command_line
from tinkerbell.cli.replay.group import replay as replay_group
from tinkerbell.config import Settings
from tinkerbell.errors import Corrupt, NotFound
from tinkerbell.events import codec
from tinkerbell.events.store import EventStore
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.replay import ArchiveLog, DatabaseLog


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Path:
    """A short run of this server's own."""
    directory = tmp_path_factory.mktemp("recorded")
    shutil.copy(sqlite_template, directory / "tinkerbell.db")
    settings = runs.run_settings(Settings(data_dir=str(directory), executor="fake"))
    with closing(EventStore.open(settings)) as store, runs.serving(store, settings):
        asker = runs.Asker(store, runs.RUN, "alice")
        asker.add_lora()
        asker.train(runs.data(1))
        asker.step()
        asker.wait()
    with closing(DatabaseLog.open(settings)) as log:
        replay.export(log, runs.RUN, directory / "run.zip")
    return directory / "run.zip"


# ---- what it may decide ---------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(archive: Path, tmp_path: Path) -> Path:
    """An archive that names code and a place, as somebody who wants something of whoever verifies it would."""

    def claim(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["columns"]["type"] == "environment.recorded":
                said = json.loads(row["columns"]["data"])
                said |= {"executor": "evil", "source": "/somewhere/evil", "options": {"dtype": "float32"}}
                row["columns"]["data"] = json.dumps(said)

    return _rewritten(archive, tmp_path / "foreign.zip", claim)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ExecutorOptions]]:
    """What a replay was about to start; nothing is."""
    asked: list[tuple[str, ExecutorOptions]] = []

    def link(kind: str, options: ExecutorOptions, *_: Any) -> Any:
        asked.append((kind, options))
        raise NotFound("enough")

    monkeypatch.setattr("tinkerbell.replay.session.ExecutorLink", link)
    return asked


USES = {
    "verify": (),
    "state": ("--at", "step:1", "--out", "out"),
    "fork": ("--at", "step:1", "--set", "learning_rate=1", "--out", "out"),
}


@pytest.mark.parametrize("use", USES)
def test_an_archive_names_no_executor_and_no_model_unasked(
    foreign: Path, started: list[tuple[str, ExecutorOptions]], use: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # The rows were changed, so what is checked first is not what this is about: only what would be started is.
    line = ["replay", use, str(foreign), *USES[use]]
    for more in ([], ["--executor", "hf"], ["--model", "/mine"]):
        command_line([*line, *more])
        said = capsys.readouterr().err
        assert not started, (more, started)
        if use != "verify":
            assert "--trust-archive" in said and "evil" in said
    if use == "verify":
        return  # finds the changed rows before it would execute anything
    command_line([*line, "--executor", "hf", "--model", "/mine"])
    assert started == [("hf", ExecutorOptions(model="/mine", threads=None, extra={}))]
    command_line([*line, "--trust-archive"])
    assert started[1] == ("evil", ExecutorOptions(model="/somewhere/evil", threads=None, extra={"dtype": "float32"}))


def test_every_command_that_executes_a_run_asks_whom_to_trust() -> None:
    assert isinstance(replay_group, click.Group)
    context = click.Context(replay_group)
    executing = set()
    for name in replay_group.list_commands(context):
        command = replay_group.get_command(context, name)
        assert command is not None
        options = {option for each in command.params for option in each.opts}
        if "--executor" in options:
            executing.add(name)
            assert "--trust-archive" in options
    assert executing == set(USES)


def test_no_code_comes_with_a_model() -> None:
    """Whoever loads something with transformers says so: what it does where nothing is said is to ask on a terminal."""
    for file in Path(tinkerbell.__file__).parent.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        for call in (each for each in calls if getattr(each.func, "attr", "") == "from_pretrained"):
            (said,) = [each.value for each in call.keywords if each.arg == "trust_remote_code"]
            assert isinstance(said, ast.Constant) and said.value is False, f"{file}:{call.lineno}"


# ---- what it may cost -----------------------------------------------------------------------------------------------


def files_of(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as source:
        return {name: source.read(name) for name in source.namelist()}


def zipped(to: Path, files: dict[str, bytes], **attributes: int) -> Path:
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            target.writestr(info, data)
    return to


def bomb(archive: Path, to: Path) -> Path:
    """Many megabytes of zeros, in a file that the manifest names."""
    files = files_of(archive)
    manifest = json.loads(files["manifest.json"])
    zeros = bytes(80 * 1024 * 1024)
    name = f"blobs/{hashlib.sha256(zeros).hexdigest()}"
    manifest["files"][name] = name.removeprefix("blobs/")
    return zipped(to, files | {name: zeros, "manifest.json": json.dumps(manifest).encode()})


def shared(archive: Path, to: Path) -> Path:
    """A list of very many names for the same bytes."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as source:
        source.writestr("bodies/1", bytes(1024 * 1024))
        info = source.getinfo("bodies/1")
        for number in range(2, 200):
            again = copy.copy(info)
            again.filename = f"bodies/{number}"
            source.filelist.append(again)
    to.write_bytes(target.getvalue())
    return to


def many(archive: Path, to: Path) -> Path:
    """An end that announces more files than anybody would list."""
    raw = bytearray(archive.read_bytes())
    end = raw.rfind(b"PK\5\6")
    raw[end + 12 : end + 16] = (2**32 - 2).to_bytes(4, "little")
    to.write_bytes(raw)
    return to


def linked(archive: Path, to: Path) -> Path:
    return zipped(to, files_of(archive), external_attr=(stat.S_IFLNK | 0o777) << 16, create_system=3)


def doubled(archive: Path, to: Path) -> Path:
    zipped(to, files_of(archive))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(to, "a") as target:
        target.writestr("manifest.json", b"{}")
    return to


def other_compression(archive: Path, to: Path) -> Path:
    with zipfile.ZipFile(to, "w", zipfile.ZIP_LZMA) as target:
        for name, data in files_of(archive).items():
            target.writestr(name, data)
    return to


def cut(archive: Path, to: Path) -> Path:
    to.write_bytes(archive.read_bytes()[:-200])
    return to


def garbage(_: Path, to: Path) -> Path:
    to.write_bytes(bytes(range(256)) * 100)
    return to


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (bomb, "more than 100 times as many"),
        (shared, "more than 100 times as many"),
        (many, "at most"),
        (linked, "has a link"),
        (doubled, "two files of one name"),
        (other_compression, "another way than deflate"),
        (cut, "was it cut off"),
        (garbage, "is not an exported run"),
    ],
)
@pytest.mark.parametrize("use", ["verify", "import"])
def test_what_is_no_archive_of_ours_is_told_before_it_costs_anything(
    archive: Path, tmp_path: Path, make: Callable[[Path, Path], Path], says: str, use: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bad = make(archive, tmp_path / "bad.zip")
    out = tmp_path / "out"
    tracemalloc.start()
    status = command_line(["replay", "import", str(bad), str(out)] if use == "import" else ["replay", use, str(bad)])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert status == (1 if use == "import" else 2)
    assert says in " ".join(capsys.readouterr().err.split())
    assert not out.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
    assert most < 8 * 1024 * 1024


def test_a_large_file_is_unpacked_in_parts(archive: Path, tmp_path: Path) -> None:
    files = files_of(archive)
    manifest = json.loads(files["manifest.json"])
    noise = random.Random(1).randbytes(40 * 1024 * 1024)
    name = hashlib.sha256(noise).hexdigest()
    manifest["files"][f"blobs/{name}"] = name
    files |= {f"blobs/{name}": noise, "manifest.json": json.dumps(manifest).encode()}
    large = zipped(tmp_path / "large.zip", files)
    del files, noise
    tracemalloc.start()
    replay.unpack(large, tmp_path / "out")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "out" / "blobs" / name).stat().st_size == 40 * 1024 * 1024
    assert most < 16 * 1024 * 1024


@pytest.mark.parametrize("where", ["file", "directory", "pipe"])
def test_a_directory_leads_nowhere_else(archive: Path, tmp_path: Path, where: str) -> None:
    directory = tmp_path / "run"
    replay.unpack(archive, directory)
    if where == "directory":
        (directory / "bodies").rename(tmp_path / "elsewhere")
        (directory / "bodies").symlink_to(tmp_path / "elsewhere")
    else:
        events = directory / "events.jsonl"
        events.rename(tmp_path / "elsewhere")
        if where == "pipe":
            os.mkfifo(events)
        else:
            events.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Corrupt, match="cannot be read"), closing(ArchiveLog.open(directory)) as log:
        for each in log.entries():
            if each.recorded.body_codec is not None:
                log.stored_body(each)


def test_a_body_that_says_it_is_endless_is_not_believed() -> None:
    frame = b"\x28\xb5\x2f\xfd\xe0" + (2**50).to_bytes(8, "little") + b"\1\0\0"
    with pytest.raises(Corrupt, match="says that it has"):
        codec.decode_body("sample.requested", "zstd", frame)
