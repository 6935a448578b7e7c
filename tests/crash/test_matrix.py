"""A server dies at any line of what writes, plans, executes, checkpoints and keeps, two or three times in a row; every
client gets every answer, the same as if nothing had happened, and the log holds.

The default run has a few; `make test-crash` has them all, and with SLICE= a part that the seed draws.
"""

import itertools
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.crash import lives
from tests.crash.lives import FAKE, NUM_STEPS, Counted, MakeSettings, Outcome, Schedule, Site
from tests.crash.workload import Answers
from tests.support.slices import Portion
from tests.support.tiny_model import write_tiny_model

AT_ONCE = 3
"""Schedules: a server spends half its life starting, and clients wait for it."""

Tell = Callable[[str], None]


class Matrix:
    """Runs schedules side by side and adds up what happened."""

    def __init__(self, make: MakeSettings, counted: Counted, options: Sequence[str] = FAKE) -> None:
        self._make = make
        self._options = options
        self.sites, self._expected = counted
        self.crashed: set[Site] = set()
        self.num_crashes = 0
        self.num_schedules = 0
        """With at least one crash."""
        self.num_twice = 0
        """With at least two."""

    def run(self, num: int, seed: int, tell: Tell = lambda _: None) -> None:
        """Until so many schedules had a crash; a third more are tried at most, since a line may not be reached."""
        schedules = itertools.islice(lives.draw(self.sites, seed), num + num // 3 + 2)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for some in iter(lambda: list(itertools.islice(schedules, AT_ONCE * 4)), []):
                for schedule, outcome in zip(some, pool.map(self._one, some), strict=True):
                    self._add(schedule, outcome)
                tell(self.summary())
                if self.num_schedules >= num:
                    return
        raise AssertionError(f"too few crashes: {self.summary()}")

    def summary(self) -> str:
        """In words."""
        return (
            f"{self.num_schedules} schedules, {self.num_crashes} crashes ({self.num_twice} schedules with two or more)"
            f" at {len(self.crashed)} of {len(self.sites)} lines, {sum(site.border for site in self.crashed)} of"
            f" {sum(site.border for site in self.sites)} borders"
        )

    def _one(self, schedule: Schedule) -> Outcome:
        settings = self._make()
        outcome = lives.run(settings, schedule, num_steps=NUM_STEPS, options=self._options)
        different = _first_difference(outcome.answers, self._expected)
        assert different is None, f"{schedule}: {different}"
        shutil.rmtree(settings.data_dir)
        return outcome

    def _add(self, schedule: Schedule, outcome: Outcome) -> None:
        self.crashed |= {crash.site for crash in outcome.carried_out}
        self.num_crashes += len(outcome.carried_out)
        self.num_schedules += bool(outcome.carried_out)
        self.num_twice += len(outcome.carried_out) > 1


def _first_difference(found: list[Answers], expected: list[Answers]) -> str | None:
    for client, (mine, other) in enumerate(zip(found, expected, strict=True)):
        for number, (one, two) in enumerate(zip(mine, other, strict=True)):
            if one != two:
                return f"answer {number} of client {client} is {one} and was {two}"
    return None


def test_a_few_on_sqlite(make_sqlite: MakeSettings, counted: Counted) -> None:
    Matrix(make_sqlite, counted).run(4, seed=1)


@pytest.mark.postgres
def test_a_few_on_postgres(make_postgres: MakeSettings, counted: Counted) -> None:
    Matrix(make_postgres, counted).run(2, seed=2)


@pytest.mark.crash
@pytest.mark.timeout(3000)
def test_the_matrix_on_sqlite(make_sqlite: MakeSettings, counted: Counted, portion: Portion, tell: Tell) -> None:
    matrix = Matrix(make_sqlite, counted)
    matrix.run(portion.number(of=300), seed=portion.drawn_by(11), tell=tell)
    if not portion.whole:
        return
    borders = [site for site in matrix.sites if site.border]
    reached = [site for site in borders if site in matrix.crashed]
    # All had their turn; how requests meet decides whether a line is reached so often.
    assert len(reached) > 0.85 * len(borders), f"missed: {sorted(set(borders) - set(reached), key=str)}"


@pytest.mark.crash
@pytest.mark.postgres
@pytest.mark.timeout(2000)
def test_the_matrix_on_postgres(make_postgres: MakeSettings, counted: Counted, portion: Portion, tell: Tell) -> None:
    Matrix(make_postgres, counted).run(portion.number(of=100), seed=portion.drawn_by(12), tell=tell)


@pytest.mark.crash
@pytest.mark.timeout(1500)
def test_the_matrix_on_hf(make_sqlite: MakeSettings, tmp_path: Path, portion: Portion, tell: Tell) -> None:
    model = write_tiny_model(tmp_path / "model")
    options = ("--executor", "hf", "--model", str(model), "--threads", "1")
    counted = lives.count(make_sqlite, tmp_path / "counts", num_steps=NUM_STEPS, options=options)
    Matrix(make_sqlite, counted, options).run(portion.number(of=20), seed=portion.drawn_by(13), tell=tell)
