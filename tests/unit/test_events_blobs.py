"""The content-addressed file store."""

import hashlib
import os
import threading
from pathlib import Path

import pytest

from tinkerbell.errors import Corrupt
from tinkerbell.events.blobs import BlobStore


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    root = tmp_path / "blobs"
    root.mkdir()
    return BlobStore(root)


def test_put_and_get(blobs: BlobStore) -> None:
    for data in (b"", b"x", os.urandom(300_000)):
        digest = blobs.put(data)
        assert digest == hashlib.sha256(data).digest()
        assert blobs.get(digest.hex()) == data
        assert blobs.path(digest.hex()).parts[-3:-1] == (digest.hex()[:2], digest.hex()[2:4])


def test_the_same_bytes_are_kept_once(blobs: BlobStore) -> None:
    digest = blobs.put(b"same").hex()
    before = blobs.path(digest).stat()
    blobs.put(b"same")
    assert blobs.path(digest).stat().st_ino == before.st_ino


def test_half_a_file_left_by_something_else_is_replaced(blobs: BlobStore) -> None:
    digest = blobs.put(b"whole").hex()
    blobs.path(digest).write_bytes(b"who")
    with pytest.raises(Corrupt, match="other bytes"):
        blobs.get(digest)
    blobs.put(b"whole")
    assert blobs.get(digest) == b"whole"


def test_missing(blobs: BlobStore) -> None:
    with pytest.raises(Corrupt, match="missing"):
        blobs.get("00" * 32)


def test_a_failed_write_leaves_nothing(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        blobs.put(b"data")
    monkeypatch.undo()
    path = blobs.path(hashlib.sha256(b"data").hexdigest())
    assert list(path.parent.iterdir()) == []


def test_the_file_is_durable_before_its_name_and_the_name_before_the_return(
    blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        steps.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    digest = blobs.put(b"data").hex()
    target = blobs.path(digest)
    assert steps[0].startswith(str(target.parent / "tmp-"))
    assert steps[1:4] == ["rename", str(target.parent), str(target.parent.parent)]


def test_many_threads_put_the_same(blobs: BlobStore) -> None:
    data = os.urandom(50_000)
    threads = [threading.Thread(target=blobs.put, args=(data,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path = blobs.path(hashlib.sha256(data).hexdigest())
    assert [item.name for item in path.parent.iterdir()] == [path.name]
