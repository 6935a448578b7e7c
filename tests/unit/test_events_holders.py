"""Whether another process can tell that the holder of a lease has ended."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tinkerbell.events.holders import has_ended, name_this_process

SAY_NAME = "from tinkerbell.events.holders import name_this_process; print(name_this_process(), flush=True); input()"


@pytest.fixture
def child() -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", SAY_NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process
        process.kill()


def name_of(child: "subprocess.Popen[str]") -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_a_name_is_given_once_and_says_who_it_is() -> None:
    assert name_this_process() != name_this_process()
    assert name_this_process("some role").startswith("some role ")
    assert f":{os.getpid()}:" in name_this_process()


def test_who_runs_or_is_stopped_has_not_ended(child: "subprocess.Popen[str]") -> None:
    name = name_of(child)
    assert not has_ended(name)
    assert not has_ended(f"role {name}")
    child.send_signal(signal.SIGSTOP)
    assert not has_ended(name)
    assert not has_ended(name_this_process())


def test_who_was_killed_has_ended_before_its_parent_knows(child: "subprocess.Popen[str]") -> None:
    name = name_of(child)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(name)
    child.wait()
    assert has_ended(name)


def test_another_process_with_the_same_id_is_somebody_else() -> None:
    host, pid, started, system, nonce = name_this_process().split(":")
    assert has_ended(f"{host}:{pid}:{int(started) - 1}:{system}:{nonce}")


@pytest.mark.parametrize("other", ["boot", "namespace"])
def test_of_another_machine_or_container_nothing_is_known(child: "subprocess.Popen[str]", other: str) -> None:
    host, pid, started, system, nonce = name_of(child).split(":")
    child.kill()
    child.wait()
    boot, namespace = system.split(".")
    moved = f"{'0' * 32}.{namespace}" if other == "boot" else f"{boot}.1"
    assert has_ended(f"{host}:{pid}:{started}:{system}:{nonce}")
    assert not has_ended(f"{host}:{pid}:{started}:{moved}:{nonce}")


@pytest.mark.parametrize("name", ["", "leader", "host:12:abcd", "a:b:c:d:e", "host:1:-:-:00"])
def test_names_of_another_form_say_nothing(name: str) -> None:
    assert not has_ended(name)


def test_the_form_of_a_name() -> None:
    assert re.fullmatch(r"[^:]+:\d+:\d+:[0-9a-f]{32}\.\d+:[0-9a-f]{8}", name_this_process())
