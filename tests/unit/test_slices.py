"""Slices of the long suites: the same for one seed, never empty, and all of the suite over the seeds."""

import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.slices import PARTS, Portion, chosen

ROOT = Path(__file__).parents[2]
SEEDS = [f"{n:040x}" for n in range(200)]

SUITE = """
import pytest
@pytest.mark.parametrize("n", range({num}))
def test_it(n): assert n >= 0
def test_drawn(portion): print("drew", portion.number(of=50), "by", portion.drawn_by(3))
"""


@pytest.mark.parametrize("num", [1, 2, PARTS, PARTS + 1, 30])
def test_slices_cover_the_suite(num: int) -> None:
    names = [f"tests/x.py::test_{n}[sqlite]" for n in range(num)]
    slices = [chosen(names, seed) for seed in SEEDS]
    assert slices == [chosen(names[::-1], seed) for seed in SEEDS], "chosen by something else than name and seed"
    assert {len(some) for some in slices} == {math.ceil(num / PARTS)}
    assert set.union(*slices) == set(names)
    assert len(set(map(frozenset, slices))) >= min(num, 100), "another seed, another slice"


def test_a_new_test_leaves_the_choice_among_the_others() -> None:
    """A slice that failed can be repeated after tests were added, but for those that the new ones push out."""
    names = [f"test_{n}" for n in range(40)]
    for seed in SEEDS:
        assert len(chosen(names, seed) - chosen([*names, "test_new"], seed)) <= 1


def test_a_portion_is_drawn_anew_for_each_seed() -> None:
    assert (Portion().number(of=300), Portion().drawn_by(11)) == (300, 11)
    for number in (1, 8, 300):
        assert {Portion(seed).number(of=number) for seed in SEEDS} == {math.ceil(number / PARTS)}
    assert len({Portion(seed).drawn_by(test) for seed in SEEDS for test in (11, 12, 13)}) == 3 * len(SEEDS)


def collected(directory: Path, *options: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.slices", "-p", "no:cacheprovider", "-m", "crash"]
    command += [f"--rootdir={directory}", "-W", "ignore::pytest.PytestUnknownMarkWarning", "-sv", *options]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, str(directory)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_says_what_it_ran_and_how_to_run_it_again(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text("import pytest\npytestmark = pytest.mark.crash\n" + SUITE.format(num=9))
    whole = collected(tmp_path)
    assert "10 passed" in whole and "drew 50 by 3\n" in whole and "SLICE" not in whole
    one = collected(tmp_path, "--slice=abc")
    size = math.ceil(9 / PARTS) + 1
    assert f"{size} passed, {10 - size} deselected" in one
    assert f"drew {math.ceil(50 / PARTS)} by {Portion('abc').drawn_by(3)}\n" in one
    said = f"slice abc: {size} of 10 tests, 1 of them in part; the same again: make test-crash SLICE=abc"
    assert one.count(said) == 2, "before the tests and after them"


def test_the_make_targets_take_a_slice() -> None:
    """`make test-MARKER SLICE=...` for each suite that the default run leaves out."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    suites = [word for word in options["addopts"][-1].split() if word not in ("not", "and")]
    assert len(suites) >= 2
    for suite in suites:
        for more, expected in (["SLICE=abc"], "--slice=abc"), ([], ""):
            command = ["make", "--dry-run", "--always-make", f"test-{suite}", *more]
            said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            (run,) = (line for line in said.splitlines() if f"pytest -m {suite} " in line)
            assert (expected in run) if expected else ("--slice" not in run)
