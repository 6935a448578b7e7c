"""An executor that hangs when it is told to: a package of a third party, as far as a server can see."""

import os
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tinkerbell.executors.fake import FakeExecutor
from tinkerbell.executors.port import Batch, ForwardBackward
from tinkerbell.executors.progress import mark
from tinkerbell.executors.protocol import ExecutorOptions

KIND = "hanging"
ROOT = Path(__file__).parents[2]


def install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes started from now on find the executor `hanging`."""
    metadata = directory / f"{KIND}-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {KIND}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[tinkerbell.executors]\n{KIND} = {__name__}:HangingExecutor\n")
    before = os.environ.get("PYTHONPATH")
    paths = [str(directory), str(ROOT), *([before] if before else [])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def options(where: str, how: str, **more: str) -> ExecutorOptions:
    """`where`: the method of the port, `__init__` for its constructor; `how`: the name of a function below."""
    return ExecutorOptions(extra={"where": where, "how": how, **more})


def sleeps() -> None:
    """As if a device did not answer."""
    time.sleep(3600)


def deadlocks() -> None:
    """As two ranks that wait for one another."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def spins() -> None:
    """As code that waits for what never comes."""
    while True:
        pass


def crawls() -> None:
    """Slow, but it comes further."""
    for _ in range(26):
        time.sleep(0.25)
        mark()


def computes() -> None:
    """Somebody else's code that makes no marks."""
    until = time.monotonic() + 6.5
    while time.monotonic() < until:
        sum(range(100_000))
        time.sleep(0.05)


WAYS = {way.__name__: way for way in (sleeps, deadlocks, spins, crawls, computes)}


class HangingExecutor:
    """The fake, but for one method. With `token` in its options only batches with data that begin with it hang."""

    def __init__(self, given: ExecutorOptions) -> None:
        extra = dict(given.extra)
        self._where, self._how = extra.pop("where"), WAYS[extra.pop("how")]
        self._token = extra.pop("token", None)
        self._fake = FakeExecutor(ExecutorOptions(extra=extra))
        if self._where == "__init__":
            self._how()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._fake, name)

        def call(*arguments: Any) -> Any:
            if name == self._where and (self._token is None or _begins_with(int(self._token), *arguments)):
                self._how()
            return method(*arguments)

        return call


def _begins_with(token: int, batch: Batch) -> bool:
    raw = struct.pack("<i", token)
    data = [datum for unit in batch.units if isinstance(unit, ForwardBackward) for datum in unit.data]
    return any(datum.tokens.startswith(raw) for datum in data)
