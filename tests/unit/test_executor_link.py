"""The link to an executor process: order, errors, death, restart, stopping."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.executor_driver import LORA, random_data
from tests.support.waiting import PATIENCE_S
from tinkerbell.errors import ExecutorDied, InvalidRequest, NotFound, ServerError
from tinkerbell.executors.link import ExecutorLink
from tinkerbell.executors.port import Batch, BatchResult, ForwardBackward, ForwardBackwardDone, UnitFailed
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.types import LoraConfig, LossSpec

SLOW = ExecutorOptions(extra={"latency_us": "30000000"})


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """No plugin: the tests are short coroutines."""
    asyncio.run(asyncio.wait_for(test(), PATIENCE_S))


@asynccontextmanager
async def started(options: ExecutorOptions | None = None) -> AsyncIterator[ExecutorLink]:
    link = ExecutorLink("fake", options or ExecutorOptions())
    await link.start()
    try:
        yield link
    finally:
        await link.stop(0.5)


def batch(request: int = 1, adapter: str = "ad_1") -> Batch:
    unit = ForwardBackward(request=request, adapter=adapter, data=random_data(1, (4,)), loss=LossSpec())
    return Batch(id=f"1.{request}", units=[unit])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def gone(pid: int, within_s: float = PATIENCE_S) -> bool:
    deadline = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return not alive(pid)


def test_calls_and_their_cost() -> None:
    async def test() -> None:
        async with started() as link:
            created = await link.create("ad_1", LORA, 1)
            assert created.busy_us >= 0
            state = await link.snapshot("ad_1")
            assert state.value.digest == created.value.state_digest
            loaded = await link.load("ad_2", state.value, True)
            assert loaded.value == created.value
            result = await link.run(batch(adapter="ad_2"))
            assert isinstance(result.results[0], ForwardBackwardDone)
            assert result.busy_us > 0
            assert (await link.remove("ad_2")).value is None
            (failed,) = (await link.run(batch(adapter="ad_2"))).results
            assert isinstance(failed, UnitFailed)

    run(test)


def test_errors_are_the_childs_and_it_lives_on() -> None:
    async def test() -> None:
        async with started() as link:
            with pytest.raises(NotFound, match="ad_nobody"):
                await link.snapshot("ad_nobody")
            with pytest.raises(InvalidRequest, match="no_such_layer"):
                await link.create("ad_1", LoraConfig(targets=("no_such_layer",)), 1)
            await link.create("ad_1", LORA, 1)

    run(test)


def test_calls_made_together_are_answered_in_order() -> None:
    async def test() -> None:
        async with started() as link:
            create = link.create("ad_1", LORA, 1)
            runs = [link.run(batch(request)) for request in range(20)]
            _, *results = await asyncio.gather(create, *runs)
            assert [result.results[0].request for result in results] == list(range(20))

    run(test)


def test_a_cancelled_call_does_not_confuse_the_next() -> None:
    async def test() -> None:
        async with started(ExecutorOptions(extra={"latency_us": "200000"})) as link:
            await link.create("ad_1", LORA, 1)
            cancelled = asyncio.create_task(link.run(batch(1)))
            await asyncio.sleep(0.05)
            cancelled.cancel()
            result = await link.run(batch(2))
            assert result.results[0].request == 2
            with pytest.raises(asyncio.CancelledError):
                await cancelled

    run(test)


def test_death_ends_the_calls_in_flight_and_a_new_child_starts() -> None:
    async def test() -> None:
        async with started(SLOW) as link:
            await link.create("ad_1", LORA, 1)
            first = link.pid
            assert first is not None
            calls = [asyncio.create_task(link.run(batch(n))) for n in range(3)]
            await asyncio.sleep(0.1)
            os.kill(first, signal.SIGKILL)
            for call in calls:
                with pytest.raises(ExecutorDied, match="SIGKILL"):
                    await call
            assert not link.alive
            with pytest.raises(ExecutorDied):
                await link.snapshot("ad_1")
            environment = await link.start()
            assert environment.executor == "fake"
            assert link.alive
            assert link.pid != first
            with pytest.raises(NotFound):
                await link.snapshot("ad_1")

    run(test)


def test_a_start_that_fails_says_why_and_leaves_no_process() -> None:
    async def test() -> None:
        link = ExecutorLink("fake", ExecutorOptions(extra={"vocab_size": "many"}))
        with pytest.raises(InvalidRequest, match="vocab_size"):
            await link.start()
        assert link.pid is None
        unknown = ExecutorLink("no_such_executor", ExecutorOptions())
        with pytest.raises(InvalidRequest, match="no_such_executor"):
            await unknown.start()

    run(test)


def test_the_interpreter_can_be_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    marker = tmp_path / "used"
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\ntouch "{marker}"\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("TINKERBELL_FAKE_PYTHON", str(wrapper))

    async def test() -> None:
        async with started() as link:
            assert link.alive
        assert marker.exists()

    run(test)


def test_a_wrong_interpreter_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def test() -> None:
        monkeypatch.setenv("TINKERBELL_FAKE_PYTHON", str(tmp_path / "nowhere"))
        with pytest.raises(ServerError, match="TINKERBELL_FAKE_PYTHON"):
            await ExecutorLink("fake", ExecutorOptions()).start()
        script = tmp_path / "false"
        script.write_text("#!/bin/sh\nexit 3\n")
        script.chmod(0o755)
        monkeypatch.setenv("TINKERBELL_FAKE_PYTHON", str(script))
        with pytest.raises(ExecutorDied, match="exit code 3"):
            await ExecutorLink("fake", ExecutorOptions()).start()

    run(test)


def test_stop_is_polite_then_firm() -> None:
    async def test() -> None:
        link = ExecutorLink("fake", ExecutorOptions())
        await link.start()
        idle = link.pid
        assert idle is not None
        await link.stop(grace_s=2 * PATIENCE_S)
        assert not alive(idle), "it goes when it is asked to"
        await link.stop()
        async with started(SLOW) as busy:
            await busy.create("ad_1", LORA, 1)
            call = asyncio.create_task(busy.run(batch()))
            await asyncio.sleep(0.1)
            # Long before the batch would end, which would be an answer.
            await busy.stop(grace_s=0.3)
            with pytest.raises(ExecutorDied):
                await call

    run(test)


def test_ctrl_c_does_not_reach_the_child() -> None:
    async def test() -> None:
        async with started() as link:
            assert link.pid is not None
            os.kill(link.pid, signal.SIGINT)
            await asyncio.sleep(0.1)
            assert isinstance(await link.create("ad_1", LORA, 1), object)
            assert link.alive

    run(test)


PARENT = """
import asyncio, sys
from tinkerbell.executors.link import ExecutorLink
from tinkerbell.executors.protocol import ExecutorOptions
from tests.support.executor_driver import LORA
from tests.unit.test_executor_link import batch

async def main():
    link = ExecutorLink("fake", ExecutorOptions(extra={"latency_us": "30000000"}))
    await link.start()
    await link.create("ad_1", LORA, 1)
    call = asyncio.create_task(link.run(batch()))
    await asyncio.sleep(0.1)
    print(link.pid, flush=True)
    await call

asyncio.run(main())
"""


def test_the_child_does_not_outlive_its_parent() -> None:
    """Even one that is killed while the child is in the middle of a batch."""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
        parent.wait()
        assert asyncio.run(gone(child))


def test_the_childs_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as asked for, and none that waits by spinning unless the person who runs the server says so."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)

    async def variables() -> dict[str, str]:
        async with started(ExecutorOptions(threads=3)) as link:
            raw = Path(f"/proc/{link.pid}/environ").read_bytes().decode()
        return dict(line.split("=", 1) for line in raw.split("\0") if "=" in line)

    found = asyncio.run(variables())
    assert (found["OMP_NUM_THREADS"], found["OMP_WAIT_POLICY"]) == ("3", "PASSIVE")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert asyncio.run(variables())["OMP_WAIT_POLICY"] == "ACTIVE"


def test_large_states_pass_through() -> None:
    async def test() -> None:
        async with started() as link:
            await link.create("ad_1", LoraConfig(rank=1024), 1)
            state = (await link.snapshot("ad_1")).value
            assert len(state.weights) > 250_000
            report = (await link.load("ad_2", state, True)).value
            assert report.state_digest == state.digest

    run(test)


def test_what_a_library_prints_does_not_disturb_the_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "sitecustomize.py"
    site.write_text("import sys\nprint('a stray line')\nsys.stdout.flush()\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    async def test() -> None:
        async with started() as link:
            result: BatchResult = await link.run(batch(adapter="ad_nobody"))
            assert isinstance(result.results[0], UnitFailed)

    run(test)


def test_a_stopped_child_is_killed_and_a_busy_one_is_not() -> None:
    async def test() -> None:
        link = ExecutorLink("fake", ExecutorOptions(extra={"latency_us": "4000000"}), silence_s=2.0)
        await link.start()
        try:
            await link.create("ad_1", LORA, 1)
            busy = await link.run(batch(1))
            assert busy.busy_us > 3_000_000
            assert link.pid is not None
            call = asyncio.create_task(link.run(batch(2)))
            os.kill(link.pid, signal.SIGSTOP)
            with pytest.raises(ExecutorDied, match="no sign of life"):
                await call
            assert not link.alive
        finally:
            await link.stop(0.5)

    run(test)
