"""Who was stopped past its lease and goes on can change nothing; who hangs is replaced."""

import json
import os
import random
import re
import signal
import sqlite3
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.crash import history, lives, workload
from tests.crash.history import History
from tests.crash.lives import FAKE, NUM_STEPS, Counted, Crash, MakeSettings, Schedule, Site
from tests.support.slices import Portion
from tests.support.waiting import eventually
from tinkerbell.cli.process import ServerProcess
from tinkerbell.config import Settings
from tinkerbell.events import tables
from tinkerbell.events.store import EventStore

LEASE_S = 1.0
PATIENCE_S = 180.0
"""For what comes at once on an idle machine."""
TAKE_OVER_S = 60.0
"""With a transaction of the stopped leader to wait for, on Postgres."""
GRANTS = {"lease.granted"}
LOST = re.compile("lease lost|refused|database does not answer")
"""What a leader says whose epoch is over, or whose session was ended."""
ENDED = re.compile(f"{LOST.pattern}|scheduler failed")
LEADER_FILES = (
    "scheduler/leader.py",
    "scheduler/journal.py",
    "scheduler/commits.py",
    "scheduler/checkpoints.py",
    "scheduler/service.py",
    "executors/link.py",
    "events/outcomes.py",
)


def zombie(settings: Settings, site: Site, crossing: int, expected: list[workload.Answers]) -> bool:
    """A leader is stopped at the site, a second server takes over and answers, the first goes on. Whether it came so
    far: it may be stopped before it leads, be done before, or hold SQLite's lock, which nobody can take from it."""
    marker = Path(settings.data_dir) / "stopped"
    plan = {"role": "server", "file": site.file, "line": site.line, "crossing": crossing, "signal": "SIGSTOP"}
    shared = lives.environment(settings, TINKERBELL_LEASE_TTL_S=str(LEASE_S))
    first = ServerProcess(
        Path(settings.data_dir),
        FAKE,
        environment={**shared, "CRASH_PLANS": json.dumps([plan | {"marker": str(marker)}])},
    )
    second = ServerProcess(Path(settings.data_dir), FAKE, environment=shared)
    seen, found, failures = History(), [], []

    def explain() -> str:
        return f"\nzombie at {site} crossing {crossing}\n{second.log_tail()}"

    def ask() -> None:
        try:
            found.append(workload.run(second.url, seen, loss=0.05, seed=crossing, num_steps=NUM_STEPS))
        except BaseException as exc:  # noqa: BLE001 - shown below
            failures.append(exc)

    clients = threading.Thread(target=ask, daemon=True)
    with EventStoreOf(settings) as store, ExitStack() as servers:
        servers.callback(first.stop)
        first.spawn()
        eventually(lambda: len(store.read(types=GRANTS)) > 0 or marker.exists(), PATIENCE_S)
        if not store.read(types=GRANTS):
            os.kill(first.pid, signal.SIGCONT)
            return False
        servers.enter_context(second)
        clients.start()
        eventually(lambda: marker.exists() or not clients.is_alive(), PATIENCE_S)
        stopped = marker.exists()
        if stopped:
            stopped = taken_over(store, settings)
            granted = store.read(types=GRANTS)[-1].position
            eventually(lambda: not stopped or not clients.is_alive() or store.head() > granted + 4, PATIENCE_S)
            os.kill(first.pid, signal.SIGCONT)
        clients.join()
        assert not failures, f"{failures}{explain()}"
        if stopped:
            # It finds out by itself, within a lease, and waits its turn.
            eventually(lambda: ENDED.search(first.log_file.read_text()) is not None, PATIENCE_S)
            assert LOST.search(first.log_file.read_text()), f"{site} crossing {crossing}\n{first.log_tail()}"
    with EventStoreOf(settings) as store:
        store.check()
        history.check(seen, store, settings, explain)
    if stopped:
        engine = sa.create_engine(settings.url, poolclass=sa.NullPool)
        with engine.connect() as connection:
            columns = tables.events.c
            late = sa.select(columns.position).where(columns.fence_epoch == 1, columns.position > granted)
            assert not connection.execute(late).all(), f"the first leader wrote after the second's lease{explain()}"
        engine.dispose()
    assert found == [expected], explain()
    return stopped


def taken_over(store: EventStore, settings: Settings) -> bool:
    """Wait for the second lease. False if the stopped leader holds SQLite's lock."""
    deadline = time.monotonic() + TAKE_OVER_S
    while len(store.read(types=GRANTS)) < 2:
        if settings.database_url is None and time.monotonic() > deadline - TAKE_OVER_S + 3 * LEASE_S:
            file = Path(settings.data_dir) / "tinkerbell.db"
            locked = pytest.raises(sqlite3.OperationalError, match="locked")
            with closing(sqlite3.connect(file, timeout=0)) as connection, locked:
                connection.execute("BEGIN IMMEDIATE")
            return False
        assert time.monotonic() < deadline, f"nobody took over within {TAKE_OVER_S:g} s"
        time.sleep(0.05)
    return True


class EventStoreOf:
    """An open store for a block."""

    def __init__(self, settings: Settings) -> None:
        self._store = EventStore.open(settings)

    def __enter__(self) -> EventStore:
        return self._store

    def __exit__(self, *_: object) -> None:
        self._store.close()


def zombies(make: MakeSettings, counted: Counted, num: int, seed: int) -> None:
    """So many leaders that were stopped, each somewhere else."""
    sites, expected = counted
    places = [
        site
        for site in sites
        if site.role == "server" and site.file.endswith(LEADER_FILES) and site.crossings >= 8 and not site.recovery
    ]
    generator = random.Random(seed)
    places = generator.sample(places, len(places))
    done = 0
    for site in places[: 12 + num * 4]:
        done += zombie(make(), site, generator.randint(2, site.crossings // 2), expected)
        if done == num:
            return
    raise AssertionError(f"only {done} leaders were stopped")


def test_a_stopped_leader_changes_nothing(make_sqlite: MakeSettings, counted: Counted) -> None:
    zombies(make_sqlite, counted, 1, seed=1)


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_stopped_leaders_on_sqlite(make_sqlite: MakeSettings, counted: Counted, portion: Portion) -> None:
    zombies(make_sqlite, counted, portion.number(of=8), seed=portion.drawn_by(2))


@pytest.mark.crash
@pytest.mark.postgres
@pytest.mark.timeout(900)
def test_stopped_leaders_on_postgres(make_postgres: MakeSettings, counted: Counted, portion: Portion) -> None:
    zombies(make_postgres, counted, portion.number(of=12), seed=portion.drawn_by(3))


@pytest.mark.crash
@pytest.mark.postgres
def test_a_leader_stopped_in_a_transaction_holds_up_nobody_for_long(
    make_postgres: MakeSettings, counted: Counted
) -> None:
    """Postgres ends its session; with SQLite everybody would wait until it goes on, for the lock is the kernel's."""
    sites, expected = counted
    writing = [site for site in sites if site.role == "server" and site.file == "tinkerbell/events/writer.py"]
    text = (lives.ROOT / "tinkerbell/events/writer.py").read_text().splitlines()
    (commit,) = (site for site in writing if "transaction.commit()" in text[site.line - 1])
    assert zombie(make_postgres(), commit, commit.crossings // 3, expected)


@pytest.mark.crash
def test_an_executor_that_hangs_is_replaced(make_sqlite: MakeSettings, counted: Counted) -> None:
    sites, expected = counted
    (running,) = (
        site
        for site in sites
        if site.role == "executor" and site.file == "tinkerbell/executors/worker.py" and _is_answer(site)
    )
    schedule = Schedule(0, ((Crash(running, running.crossings // 2, "STOP"),),), 0.0)
    more = {"TINKERBELL_EXECUTOR_SILENCE_S": "5"}
    outcome = lives.run(make_sqlite(), schedule, num_steps=NUM_STEPS, **more)
    assert len(outcome.carried_out) == 1
    assert outcome.num_lives == 1, "the server stays up"
    assert outcome.answers == expected


def _is_answer(site: Site) -> bool:
    return "voice.say(worker.answer(command))" in (lives.ROOT / site.file).read_text().splitlines()[site.line - 1]
