"""A slice of a suite that takes too long for every change: what a seed chooses, something else for each seed.

A suite is a marker and a make target of its name, `make test-MARKER`, which runs all of it; with `SLICE=SEED` it runs a
slice. A test that draws its own work asks for the fixture `portion`: it is in every slice, and does a part of its work
there. Of the other tests the seed chooses one in PARTS.
"""

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pytest

PARTS = 5
"""Slices that are as much work as the whole."""


@dataclass(frozen=True)
class Portion:
    """How much a test does that draws its own work."""

    seed: str | None = None
    """Of the slice; None is the whole."""

    @property
    def whole(self) -> bool:
        return self.seed is None

    def number(self, of: int) -> int:
        """Of so many draws, at least one."""
        return of if self.whole else math.ceil(of / PARTS)

    def drawn_by(self, seed: int) -> int:
        """What to draw with: the whole draws the same each time, a slice what no other has."""
        return seed if self.whole else int.from_bytes(_hash(self.seed, seed)[:6])


def chosen(names: Collection[str], seed: str) -> set[str]:
    """One in PARTS of the names, rounded up."""
    return set(sorted(names, key=lambda name: _hash(seed, name))[: math.ceil(len(names) / PARTS)])


def _hash(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


# ---- pytest ----------------------------------------------------------------------------------------------------------

_said = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slice", metavar="SEED", help="run what this seed chooses (the name of a commit, or any word)")


@pytest.fixture(scope="session")
def portion(pytestconfig: pytest.Config) -> Portion:
    """How much of its work the test does that draws it."""
    return Portion(pytestconfig.getoption("slice") or None)


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("slice")
    if not seed:
        return
    in_part = {item.nodeid for item in items if "portion" in getattr(item, "fixturenames", ())}
    kept = in_part | chosen([item.nodeid for item in items if item.nodeid not in in_part], seed)
    left_out = [item for item in items if item.nodeid not in kept]
    config.stash[_said] = (
        f"slice {seed}: {len(kept)} of {len(items)} tests, {len(in_part)} of them in part; the same again:"
        f" make test-{config.option.markexpr} SLICE={seed}"
    )
    items[:] = [item for item in items if item.nodeid in kept]
    config.hook.pytest_deselected(items=left_out)


def pytest_report_collectionfinish(config: pytest.Config) -> str | Sequence[str]:
    return config.stash.get(_said, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _said in config.stash:
        terminalreporter.write_line(config.stash[_said])
