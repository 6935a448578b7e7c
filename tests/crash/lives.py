"""A server that lives several times: each life ends at a line that a plan names, and the next one begins."""

import functools
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count as count_up
from itertools import pairwise
from pathlib import Path

from tests.crash import history, workload
from tests.crash.history import History
from tests.crash.workload import Answers
from tinkerbell.cli.process import ServerProcess
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore

INJECT = Path(__file__).parent / "inject"
ROOT = Path(__file__).parents[2]
FAKE = ("--executor", "fake")
LOOK_S = 0.02
MOST_LIVES = 40
"""Of one schedule: more can only be a server that does not come up by itself."""

FILES = (
    "tinkerbell/events/writer.py",
    "tinkerbell/events/blobs.py",
    "tinkerbell/events/sweeping.py",
    "tinkerbell/events/outcomes.py",
    "tinkerbell/scheduler/service.py",
    "tinkerbell/scheduler/leader.py",
    "tinkerbell/scheduler/commits.py",
    "tinkerbell/scheduler/journal.py",
    "tinkerbell/scheduler/checkpoints.py",
    "tinkerbell/scheduler/superseding.py",
    "tinkerbell/events/retention.py",
    "tinkerbell/scheduler/control.py",
    "tinkerbell/scheduler/recovery.py",
    "tinkerbell/scheduler/restorer.py",
    "tinkerbell/executors/link.py",
    "tinkerbell/executors/fake.py",
    "tinkerbell/executors/hf/executor.py",
    "tinkerbell/executors/hf/trainer.py",
    "tinkerbell/executors/hf/optimizer.py",
    "tinkerbell/executors/hf/checkpoint.py",
    "tinkerbell/executors/worker.py",
    "tinkerbell/api/submissions.py",
)
"""Writer, blob store, its sweep, leader, checkpoint writer, executor link on both ends, and where requests come in."""


BORDER = re.compile(
    r"\bawait\b|\bcommit\(|\bbegin\(|fsync|\.replace\(|_sync_|\bsubmit|\.put\(|\b_?insert\(|\bexecute\("
    r"|deliver\(|set_result|set_exception|\.write\(|\bsay\(|sendall|read_frame|_on_commit|create_task"
)
"""Of the code's text: commits, syncs, hand-overs, and where a coroutine may be left for another."""

Line = tuple[str, str, int]
"""(role, file, number)."""

NUM_STEPS = 4
"""Of each client, where a test does not want more."""


@dataclass(frozen=True)
class Site:
    """A line that a process of this role crosses."""

    role: str
    file: str
    line: int
    crossings: int
    """In a run without crashes, or for a line of recovery in one with a few."""
    recovery: bool = False
    """Nobody comes here unless something happened before."""
    border: bool = False
    """Something becomes durable, is handed over or is waited for here, or was just before."""


@dataclass(frozen=True)
class Crash:
    """One process ends, the first time one comes so far."""

    site: Site
    crossing: int
    signal: str = "KILL"

    def __str__(self) -> str:
        return f"{self.signal} {self.site.role} at {self.site.file}:{self.site.line} crossing {self.crossing}"


@dataclass(frozen=True)
class Schedule:
    """What happens to one server."""

    seed: int
    lives: tuple[tuple[Crash, ...], ...]
    """The crashes that wait in each life; after the last one nothing more happens."""
    loss: float
    """The part of answers that do not reach their client."""

    def __str__(self) -> str:
        lives = " / ".join(", ".join(map(str, crashes)) for crashes in self.lives)
        return f"schedule {self.seed}: {lives}; {self.loss:.0%} of answers lost"


@dataclass(frozen=True)
class Outcome:
    """How a schedule went."""

    answers: list[Answers]
    carried_out: tuple[Crash, ...]
    num_lives: int
    num_lost: int
    """Attempts of clients without an answer."""
    wall_s: float


MakeSettings = Callable[[], Settings]
"""Settings of a new, empty database and a data directory of its own."""
Counted = tuple[list[Site], list[Answers]]
"""The lines there are, and what clients are told."""


def free_port() -> int:
    """A loopback port that nobody has now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def environment(settings: Settings, **more: str) -> dict[str, str]:
    """Of a server with frequent recovery points and small batches."""
    paths = [str(INJECT), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TINKERBELL_DATABASE_URL": settings.url,
        "TINKERBELL_CHECKPOINT_EVERY_STEPS": "2",
        "TINKERBELL_BATCH_TOKENS": "64",
        "TINKERBELL_CHUNK_TOKENS": "16",
        "TINKERBELL_ORPHAN_GRACE_S": "2",
        **more,
    }


class Lives:
    """Keeps a server up on one port, whatever it dies of, until it is told to stop."""

    def __init__(self, settings: Settings, schedule: Schedule, options: Sequence[str], **more: str) -> None:
        self.settings = settings
        self.schedule = schedule
        self.port = free_port()
        self.num_lives = 0
        self._options = [*options, "--port", str(self.port)]
        self._environment = environment(settings, **more)
        self._done = threading.Event()
        self._server: ServerProcess | None = None
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self.failure: str | None = None

    @property
    def pid(self) -> int:
        """Of the server in its present life."""
        assert self._server is not None
        return self._server.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def markers(self) -> Path:
        return Path(self.settings.data_dir) / "crashes"

    def marker(self, life: int, number: int) -> Path:
        return self.markers / f"{life}-{number}"

    def start(self) -> None:
        self.markers.mkdir(parents=True)
        self._thread.start()

    def stop(self) -> None:
        """End it politely; what waits on the way out may still happen."""
        self._done.set()
        self._thread.join()

    def log(self) -> str:
        return (Path(self.settings.data_dir) / "server.log").read_text(errors="replace")

    def carried_out(self) -> tuple[Crash, ...]:
        lives = enumerate(self.schedule.lives)
        return tuple(
            crash
            for life, crashes in lives
            for number, crash in enumerate(crashes)
            if self.marker(life, number).exists()
        )

    def _plans(self, life: int) -> str:
        """Of this life; a crash of an earlier one that never came is not waited for."""
        crashes = self.schedule.lives[life] if life < len(self.schedule.lives) else ()
        return json.dumps([
            {
                "role": crash.site.role, "file": crash.site.file, "line": crash.site.line, "crossing": crash.crossing,
                "signal": f"SIG{crash.signal}", "marker": str(self.marker(life, number)),
            }
            for number, crash in enumerate(crashes)
        ])  # fmt: skip

    def _endings(self) -> tuple[int, ...]:
        """The exit statuses that a life may end with."""
        life = self.num_lives - 1
        crashes = self.schedule.lives[life] if life < len(self.schedule.lives) else ()
        polite = [0] if any(crash.signal == "TERM" for crash in crashes) else []
        # A server whose first executor dies before it is up says so and ends.
        failed = [1] if any(crash.site.role == "executor" for crash in crashes) else []
        return (-9, *polite, *failed)

    def _keep(self) -> None:
        while not self._done.is_set():
            plans = self._plans(self.num_lives)
            server = ServerProcess(
                Path(self.settings.data_dir), self._options, environment={**self._environment, "CRASH_PLANS": plans}
            )
            server.spawn()
            self._server = server
            self.num_lives += 1
            while server.returncode is None and not self._done.is_set():
                time.sleep(LOOK_S)
            if self._done.is_set():
                server.stop()
            elif server.returncode not in self._endings() or self.num_lives > MOST_LIVES:
                self.failure = f"life {self.num_lives} ended with {server.returncode}: {server.log_tail()}"
                return


def run(
    settings: Settings, schedule: Schedule, *, num_steps: int, options: Sequence[str] = FAKE, **more: str
) -> Outcome:
    """The whole workload through the schedule; every invariant of the log and the clients' history are checked."""
    lives = Lives(settings, schedule, options, **more)
    seen = History()

    def explain() -> str:
        return f"\n{schedule}\n{lives.failure or ''}\n{lives.log()[-4000:]}"

    began = time.monotonic()
    lives.start()
    try:
        answers = workload.run(lives.url, seen, loss=schedule.loss, seed=schedule.seed, num_steps=num_steps)
    except Exception as exc:
        raise AssertionError(f"a client failed: {exc!r}{explain()}") from exc
    finally:
        lives.stop()
    wall_s = time.monotonic() - began
    assert lives.failure is None, explain()
    store = EventStore.open(settings)
    try:
        store.check()
        # Whatever a life left behind goes, and nothing that is needed.
        store.sweeper.sweep(-1)
        store.check()
        history.check(seen, store, settings, explain)
    finally:
        store.close()
    return Outcome(answers, lives.carried_out(), lives.num_lives, seen.num_lost, wall_s)


def count(
    make_settings: Callable[[], Settings], directory: Path, *, num_steps: int, options: Sequence[str] = FAKE
) -> tuple[list[Site], list[Answers]]:
    """The lines that are crossed, and what clients are told where nothing happens.

    Lines of recovery are crossed by a second run, in whose middle the executor is killed and the server stopped
    politely, so that it can still write down its counts.
    """
    directory.mkdir()
    more = {"CRASH_COUNTS": str(directory), "CRASH_FILES": json.dumps(FILES)}
    undisturbed = run(make_settings(), Schedule(0, (), 0.0), num_steps=num_steps, options=options, **more)
    ordinary = _crossings(directory)

    def most_crossed(role: str, file: str) -> Site:
        key = max((key for key in ordinary if key[:2] == (role, file)), key=lambda key: ordinary[key])
        return Site(*key, ordinary[key])

    worker, journal = (
        most_crossed("executor", "tinkerbell/executors/worker.py"),
        most_crossed("server", "tinkerbell/scheduler/journal.py"),
    )
    killed = Crash(worker, worker.crossings // 3)
    stopped = Crash(journal, journal.crossings // 2, "TERM")
    schedule = Schedule(1, ((killed, stopped),), 0.0)
    disturbed = run(make_settings(), schedule, num_steps=num_steps, options=options, **more)
    assert disturbed.carried_out == (killed, stopped), "nothing was disturbed"
    assert disturbed.answers == undisturbed.answers
    everything = _crossings(directory)
    sites = [
        Site(*key, ordinary.get(key, crossings), recovery=key not in ordinary, border=key in _borders(everything))
        for key, crossings in sorted(everything.items())
    ]
    return sites, undisturbed.answers


def _borders(crossed: Iterable[Line]) -> set[Line]:
    """Of these lines those that have a border in them, and the next ones of their files."""
    found: set[Line] = set()
    for one, following in pairwise(sorted(crossed)):
        if BORDER.search(_source(one[1])[one[2] - 1]):
            found |= {one, following} if one[:2] == following[:2] else {one}
    return found


@functools.cache
def _source(file: str) -> list[str]:
    return (ROOT / file).read_text().splitlines()


def _crossings(directory: Path) -> dict[Line, int]:
    """What was counted, the larger number where several processes did."""
    found: dict[Line, int] = {}
    for path in sorted(directory.glob("*.json")):
        role = path.name.partition("-")[0]
        for name, line, crossings in json.loads(path.read_text()):
            (file,) = (file for file in FILES if name.endswith(file))
            key = (role, file, line)
            found[key] = max(found.get(key, 0), crossings)
    return found


def draw(sites: Sequence[Site], seed: int) -> Iterator[Schedule]:
    """Schedules of two or three lives, without end. Each border has its turn, then each other line, before any has it
    again: as the first crash, or, where it belongs to recovery, as the second."""
    generator = random.Random(seed)
    ordinary = [site for site in sites if not site.recovery]
    deck = sorted(generator.sample(sites, len(sites)), key=lambda site: not site.border)
    for number in count_up():
        site = deck[number % len(deck)]
        first = generator.choice(ordinary) if site.recovery else site
        # How often a line is crossed depends on how requests meet, so the last crossings may not come.
        crashes = [Crash(first, generator.randint(1, max(1, first.crossings * 3 // 4)))]
        others = [site if site.recovery else generator.choice(sites), generator.choice(sites)]
        # A later life begins with recovery: early crossings are the interesting ones.
        crashes += [Crash(other, generator.randint(1, max(1, other.crossings // 4))) for other in others]
        lives = tuple((crash,) for crash in crashes[: generator.choice((2, 3))])
        # What happens to an executor is over in its own life: the next crash need not wait for the server's end.
        if crashes[0].site.role == "executor":
            lives = ((crashes[0], crashes[1]), *lives[2:])
        yield Schedule(number, lives, generator.choice((0.0, 0.1)))
