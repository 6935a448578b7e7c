"""A converted model appears whole or not at all."""

import importlib.metadata
import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from tinkerbell.errors import InvalidRequest
from tinkerbell.executors.hf import gguf


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package `some_model`, whose directory this is, and an empty cache."""
    root = tmp_path / "site" / "some_model"
    root.mkdir(parents=True)
    found = importlib.util.find_spec
    spec = ModuleSpec("some_model", None, is_package=True)
    spec.submodule_search_locations = [str(root)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if name == "some_model" else found(name))
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"some_model": ["some-model"]})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2")
    monkeypatch.setenv("TINKERBELL_CACHE", str(tmp_path / "cache"))
    return root


def written(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_converts_once(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "tiny.gguf").write_bytes(b"")
    calls: list[Path] = []

    def dequantise(file: Path, directory: Path) -> None:
        calls.append(file)
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_dequantise", dequantise)
    target = gguf.convert("some_model")
    assert target == tmp_path / "cache" / "models" / "some_model-1.2" / "tiny"
    assert gguf.convert("some_model") == target
    assert calls == [package / "tiny.gguf"]
    assert written(tmp_path / "cache") == ["models/some_model-1.2/tiny/config.json"]


def test_a_conversion_that_fails_leaves_nothing(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "tiny.gguf").write_bytes(b"")

    def dequantise(file: Path, directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(gguf, "_dequantise", dequantise)
    with pytest.raises(OSError, match="disk full"):
        gguf.convert("some_model")
    assert written(tmp_path / "cache") == []


def test_two_processes_converting_at_once(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one to finish takes the first one's result and removes its own."""
    (package / "tiny.gguf").write_bytes(b"")

    def dequantise(file: Path, directory: Path) -> None:
        (directory / "config.json").write_text("mine")
        other = directory.parent / "tiny"
        other.mkdir()
        (other / "config.json").write_text("theirs")

    monkeypatch.setattr(gguf, "_dequantise", dequantise)
    assert (gguf.convert("some_model") / "config.json").read_text() == "theirs"
    assert written(tmp_path / "cache") == ["models/some_model-1.2/tiny/config.json"]


@pytest.mark.parametrize("names", [(), ("a.gguf", "b.gguf")])
def test_a_package_needs_exactly_one(package: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (package / name).write_bytes(b"")
    with pytest.raises(InvalidRequest, match=f"has {len(names)} GGUF files"):
        gguf.convert("some_model")
