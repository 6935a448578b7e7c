"""Whatever a server or a command writes, nobody but its owner can read it, under any umask."""

import ast
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import click
import msgspec
import pytest

import tinkerbell
from tests.support.server import client_of, eventually, fake_server
from tinkerbell.cli.main import cli
from tinkerbell.cli.main import run as command_line
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore
from tinkerbell.sdk import Datum

WRITING = {
    "serve --ready-file", "demo --out", "bench --json", "bench train --plot", "replay verify --plot",
    "replay diff --plot", "replay state --out", "replay fork --out", "replay fork --plot", "replay export --out",
    "replay import directory",
}  # fmt: skip
"""Parameters that name what a command writes."""


@pytest.fixture
def open_to_all() -> Iterator[None]:
    """The most careless umask."""
    before = os.umask(0)
    yield
    os.umask(before)


def loose(directory: Path) -> list[tuple[str, str]]:
    """Everything below it that others may do anything with."""
    found = [directory, *directory.rglob("*")]
    return [(str(path), oct(path.stat().st_mode)) for path in found if stat.S_IMODE(path.stat().st_mode) & 0o077]


def test_whatever_is_written_is_its_owners(open_to_all: None, tmp_path: Path) -> None:
    home = tmp_path / "home"
    data = home / "data" / "deeper"
    where = ["--data-dir", str(data)]
    with fake_server(data) as server, client_of(server) as client:
        adapter = client.add_lora(rank=2, seed=1, name="one")
        other = client.add_lora(rank=2, seed=2, name="two")
        # Long enough for a blob; trained, saved and sampled from.
        words = [Datum(tokens=[(i * j) % 250 + 1 for i in range(3000)], targets=[2] * 3000) for j in range(1, 40)]
        for each in (adapter, other):
            each.forward_backward(words).result()
            each.optim_step(learning_rate=0.1).result()
        adapter.save("kept").result()
        assert loose(home) == []
        names = {path.name for path in data.iterdir()}
        assert {"tinkerbell.db", "tinkerbell.db-wal", "tinkerbell.db-shm", "blobs", "encryption.key"} <= names
    second = fake_server(home / "second")
    second.spawn()
    try:
        eventually(lambda: any((home / "second").glob("ready-*.json")), within_s=60)
        assert loose(home) == []
    finally:
        second.stop()
    out = home / "out"
    for line in (
        ["keys", "create", "alice", *where],
        ["replay", "export", adapter.id, "--out", str(home / "run.zip"), *where],
        ["replay", "import", str(home / "run.zip"), str(out / "run")],
        ["replay", "verify", adapter.id, "--plot", str(home / "a.html"), *where],
        ["replay", "diff", adapter.id, other.id, "--plot", str(home / "b.png"), *where],
        ["replay", "state", adapter.id, "--at", "step:1", "--with-optimizer", "--out", str(out / "state"), *where],
        ["replay", "fork", adapter.id, "--at", "0", "--set", "learning_rate=1", "--out", str(out / "f" / "g"),
         "--plot", str(home / "c.png"), *where],
        ["audit", "seal", *where],
        ["db", "compact", "--older-than", "1d", *where],
        ["tenants", "erase", "local", "--yes", *where],
        ["db", "upgrade", "--database-url", f"sqlite:///{home / 'made' / 'here' / 'x.db'}"],
    ):  # fmt: skip
        assert command_line(line) in (0, 1), line
    written = {path.name for path in home.rglob("*")}
    assert {
        "run.zip",
        "manifest.json",
        "a.html",
        "b.png",
        "c.png",
        "fork.json",
        "optimizer.safetensors",
        "x.db",
    } <= written
    assert loose(home) == []


def test_every_parameter_that_names_an_output_is_known() -> None:
    """A new one is made with tinkerbell/files.py, and the test above writes it."""
    reading = {"--config", "file"}
    found = {
        f"{path} {max(each.opts, key=len)}".strip()
        for path, command in commands(cli, "")
        for each in command.params
        if isinstance(each.type, click.Path) and max(each.opts, key=len) not in reading
    }
    assert {"bench --json" if name.endswith(" --json") else name for name in found} == WRITING


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{path} {name}".strip(), command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}".strip())


def test_nothing_is_written_but_through_the_one_file() -> None:
    """A user's downloads have the mode that the user's umask gives, and so has the cache of models, which hold no data
    of anybody."""
    root = Path(tinkerbell.__file__).parent
    free = {"files.py", "sdk/archive.py", "executors/hf/gguf.py", "cli/bench/machine.py", "cli/bench/memory.py"}
    for file in sorted(root.rglob("*.py")):
        if (name := str(file.relative_to(root))) in free:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            writes = called in ("write_text", "write_bytes", "mkdir", "makedirs", "touch")
            opens = called == "open" and any(set(mode) <= set("rwxab+t") and set(mode) & set("wxa") for mode in modes)
            assert not writes and not opens, f"{name}:{node.lineno}: use tinkerbell/files.py"


def test_what_was_loose_is_tightened_and_said(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with closing(EventStore.open(settings)):
        pass
    data = Path(settings.data_dir)
    for path in (data, data / "blobs"):
        path.chmod(0o755)
    (data / "tinkerbell.db").chmod(0o644)
    caplog.clear()
    with caplog.at_level(logging.WARNING), closing(EventStore.open(settings)):
        assert loose(data) == []
    assert [str(data) in each.getMessage() for each in caplog.records] == [True] * 3
    shared = data / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    elsewhere = msgspec.structs.replace(settings, data_dir=str(shared), database_url=settings.url)
    with closing(EventStore.open(elsewhere)):
        assert stat.S_IMODE(shared.stat().st_mode) == 0o1777, "a directory of everybody's stays it"
        assert loose(shared / "blobs") == []


def test_a_server_does_not_start_with_a_loose_key_file(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o604)
    server = fake_server(tmp_path / "data", environment={"TINKERBELL_KEY_FILE": str(key)})
    server.spawn()
    assert server.wait(60) == 1
    assert f"chmod 600 {key}" in server.log_tail()
