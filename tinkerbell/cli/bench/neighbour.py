"""`tinkerbell bench neighbour`: one tenant's requests beside each attack of another."""

import multiprocessing
import tempfile
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import click

from tinkerbell.cli.bench import machine
from tinkerbell.cli.bench.attacks.table import ATTACKS
from tinkerbell.cli.bench.attacks.target import Target
from tinkerbell.cli.bench.client import RawClient, training_body
from tinkerbell.cli.bench.fairness import OPTIM_STEP
from tinkerbell.cli.bench.long_log import LongLog
from tinkerbell.cli.bench.measure import Rate, closed_loop
from tinkerbell.cli.bench.report import Report, Rows, at_most, json_file_option, publish
from tinkerbell.cli.keys import create_key
from tinkerbell.cli.process import ServerProcess
from tinkerbell.config import Settings
from tinkerbell.errors import ServerError
from tinkerbell.events.store import EventStore

COLUMNS = ("attack", "p50_ms", "p99_ms", "p50_ratio", "p99_ratio", "steps", "calm_s")
MOST = 3.0
"""Times its p50 alone that the neighbour's p50 may be."""
NEIGHBOUR, ATTACKER = "neighbour", "attacker"
ALONE = "alone"
TOKENS = 256
BEGIN_S = 1.0
"""What an attack gets to unfold before the neighbour is measured."""
CALM_S = 30.0
"""How long is waited, at most, for the neighbour to be as fast as alone after an attack."""


@click.command()
@click.option("--seconds", type=click.FloatRange(min=0.5), default=5.0, show_default=True, help="Of each attack.")
@click.option("--lives", type=click.IntRange(min=1), default=2000, show_default=True, help="Adapters the attacker had.")
@click.option(
    "--attack",
    "names",
    type=click.Choice(list(ATTACKS)),
    multiple=True,
    help="This one only; may be given again.  [default: all]",
)
@json_file_option
def neighbour(seconds: float, lives: int, names: tuple[str, ...], json_file: Path | None) -> None:
    """One tenant's p50 and p99 beside each attack of another tenant, as ratios to its p50 alone in the same run.

    The neighbour takes one small training step after the other (fwdbwd and optim_step sent together, both awaited)
    with the fake executor, so that what is measured is the server. The attacker, in a process of its own, has a key, a
    long history and no scruples. Attacks come one after the other, against one and the same server; before the next
    the neighbour must be calm again.

    \b
    tinkerbell bench neighbour
    tinkerbell bench neighbour --attack runs --attack audit --seconds 10
    """
    with tempfile.TemporaryDirectory(prefix="tinkerbell-bench-") as scratch:
        facts = machine.describe(Path(scratch))
        rows = run(Path(scratch) / "data", seconds, lives, names or tuple(ATTACKS))
    report = Report(
        benchmark="neighbour",
        parameters={"seconds": seconds, "lives": lives, "tokens": TOKENS, "database": "sqlite, durability full"},
        machine=facts,
        rows=rows,
        expectations=[
            at_most(f"p50 beside {row['attack']}, of p50 alone", row["p50_ratio"], MOST)
            for row in rows
            if row["attack"] != ALONE
        ],
    )
    publish(report, COLUMNS, json_file)


class Steps:
    """Calling it is one training step of the neighbour."""

    def __init__(self, url: str, key: str) -> None:
        self._client = RawClient(url, key)
        self._adapter = self._client.add_lora(1)
        self._body = training_body(TOKENS, TOKENS)

    def __call__(self) -> None:
        gradients = self._client.post(f"/v1/adapters/{self._adapter}/fwdbwd", self._body)
        update = self._client.post(f"/v1/adapters/{self._adapter}/optim_step", OPTIM_STEP)
        self._client.result(gradients)
        self._client.result(update)


def run(data_dir: Path, seconds: float, lives: int, names: tuple[str, ...]) -> Rows:
    """A row for the neighbour alone, and one for each attack."""
    settings = Settings(data_dir=str(data_dir))
    keys = {tenant: create_key(settings, tenant) for tenant in (NEIGHBOUR, ATTACKER)}
    store = EventStore.open(settings)
    past = LongLog(store).fill(ATTACKER, lives, 2)
    store.close()
    options = ["--executor", "fake", "--executor-option", "us_per_token=5", "--executor-option", "latency_us=2000"]
    with ServerProcess(data_dir, [*options, "--executor-option", "max_length=4096"]) as server:
        attacker = RawClient(server.url, keys[ATTACKER])
        target = Target(
            url=server.url,
            key=keys[ATTACKER],
            adapter=attacker.add_lora(1),
            run=past[0].model,
            session=past[0].session,
        )
        attacker.close()
        steps = Steps(server.url, keys[NEIGHBOUR])
        alone = closed_loop([steps], 2 * seconds)
        rows = [_row(ALONE, alone, alone, None)]
        click.echo(f"{ALONE}: p50 {alone.p50_ms:.1f} ms, p99 {alone.p99_ms:.1f} ms", err=True)
        for name in names:
            beside = _beside(name, target, steps, seconds)
            rows.append(_row(name, beside, alone, _calm_s(steps, alone)))
            click.echo(f"{name}: p50 {rows[-1]['p50_ratio']:.1f}x, p99 {rows[-1]['p99_ratio']:.1f}x", err=True)
            if server.returncode is not None:
                raise ServerError(f"The server ended at {name}; its log ends with:\n{server.log_tail()}")
    return rows


def _beside(name: str, target: Target, steps: Steps, seconds: float) -> Rate:
    processes = multiprocessing.get_context("spawn")
    stop = processes.Event()
    attack = processes.Process(target=attack_with, args=(name, target, stop), daemon=True)
    attack.start()
    try:
        time.sleep(BEGIN_S)
        return slowest_counts(steps, seconds)
    finally:
        stop.set()
        attack.join(5)
        if attack.is_alive():
            attack.terminate()
            attack.join()


def attack_with(name: str, target: Target, stop: Event) -> None:
    """In a process of its own: all threads of an attack, until the end."""
    attack = ATTACKS[name]
    threads = [threading.Thread(target=attack.run, args=(target, stop), daemon=True) for _ in range(attack.num_threads)]
    for thread in threads:
        thread.start()
    stop.wait()
    for thread in threads:
        thread.join(1)


def slowest_counts(steps: Steps, seconds: float) -> Rate:
    """`closed_loop`, where a step that takes longer than all of the time is the one that was measured."""
    began = time.perf_counter()
    try:
        return closed_loop([steps], seconds, warmup_s=0.0)
    except TimeoutError:
        took_s = time.perf_counter() - began
        return Rate(
            num_clients=1,
            seconds=took_s,
            num_operations=1,
            per_second=1 / took_s,
            p50_ms=took_s * 1e3,
            p99_ms=took_s * 1e3,
        )


def _calm_s(steps: Steps, alone: Rate) -> float:
    """Seconds until three steps in a row took at most twice what they take alone; CALM_S where that did not come."""
    began, in_a_row = time.perf_counter(), 0
    while in_a_row < 3 and time.perf_counter() - began < CALM_S:
        start = time.perf_counter()
        steps()
        in_a_row = in_a_row + 1 if (time.perf_counter() - start) * 1e3 <= 2 * alone.p50_ms else 0
    return time.perf_counter() - began


def _row(name: str, rate: Rate, alone: Rate, calm_s: float | None) -> dict[str, Any]:
    return {
        "attack": name,
        "p50_ms": rate.p50_ms,
        "p99_ms": rate.p99_ms,
        "p50_ratio": rate.p50_ms / alone.p50_ms,
        "p99_ratio": rate.p99_ms / alone.p50_ms,
        "steps": rate.num_operations,
        "calm_s": calm_s,
    }
