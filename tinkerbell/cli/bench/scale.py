"""`tinkerbell bench scale`: a server on a log that has grown long, against one on an empty log."""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click

from tinkerbell.cli.bench import machine
from tinkerbell.cli.bench.long_log import LongLog
from tinkerbell.cli.bench.measure import closed_loop
from tinkerbell.cli.bench.neighbour import Steps
from tinkerbell.cli.bench.report import Report, at_most, json_file_option, publish
from tinkerbell.cli.keys import create_key
from tinkerbell.cli.process import ServerProcess
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.host import ExecutorHost

COLUMNS = ("log", "events", "start_s", "p50_ms", "p99_ms")
EMPTY, LONG = "empty", "long"
START_S = 3.0
RATIO = 1.3
STEPS_PER_LIFE = 20
NUM_TENANTS = 20
NUM_PENDING = 100
"""Requests, as old as the log, that wait when the server starts."""
OPTIONS = ("--executor", "fake", "--executor-option", "us_per_token=5", "--executor-option", "latency_us=2000")


@click.command()
@click.option("--events", "num_events", type=click.IntRange(min=1000), default=200_000, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Of each server in turn.")
@click.option("--seconds", type=click.FloatRange(min=0.5), default=2.0, show_default=True, help="Of a round.")
@json_file_option
def scale(num_events: int, rounds: int, seconds: float, json_file: Path | None) -> None:
    """How long a server takes to start, and one small training step, on a long log and on an empty one.

    The long log has many tenants' programs from their beginning to their end, and requests that have waited from its
    first day. Steps are measured on both servers in turn, so that what else the machine does falls on both.

    \b
    tinkerbell bench scale
    tinkerbell bench scale --events 1000000
    """
    with tempfile.TemporaryDirectory(prefix="tinkerbell-bench-") as scratch:
        facts = machine.describe(Path(scratch))
        rows, executor_s = run(Path(scratch), num_events, rounds, seconds)
    empty, long = rows
    report = Report(
        benchmark="scale",
        parameters={"events": num_events, "rounds": rounds, "seconds": seconds, "executor_start_s": executor_s},
        machine=facts,
        rows=rows,
        expectations=[
            at_most("seconds to start beyond the executor's, long log", long["start_s"] - executor_s, START_S),
            at_most("p50 of a step, of that on an empty log", long["p50_ms"] / empty["p50_ms"], RATIO),
        ],
    )
    publish(report, COLUMNS, json_file)


def run(scratch: Path, num_events: int, rounds: int, seconds: float) -> tuple[list[dict[str, Any]], float]:
    """A row for each log, and the seconds that an executor takes to start by itself."""
    settings = {name: Settings(data_dir=str(scratch / name), executor="fake") for name in (EMPTY, LONG)}
    keys = {name: create_key(of, "neighbour") for name, of in settings.items()}
    fill(settings[LONG], num_events)
    executor_s = asyncio.run(_start_executor(settings[EMPTY]))
    rates: dict[str, list[tuple[float, float]]] = {EMPTY: [], LONG: []}
    with serving(settings[EMPTY]) as (empty, empty_s), serving(settings[LONG]) as (long, long_s):
        steps = {EMPTY: Steps(empty.url, keys[EMPTY]), LONG: Steps(long.url, keys[LONG])}
        for _ in range(rounds):
            for name, step in steps.items():
                rate = closed_loop([step], seconds)
                rates[name].append((rate.p50_ms, rate.p99_ms))
    started_s = {EMPTY: empty_s, LONG: long_s}
    rows = [
        {
            "log": name,
            "events": 0 if name == EMPTY else num_events,
            "start_s": started_s[name],
            "p50_ms": median(p50 for p50, _ in rates[name]),
            "p99_ms": median(p99 for _, p99 in rates[name]),
        }
        for name in (EMPTY, LONG)
    ]
    return rows, executor_s


def fill(settings: Settings, num_events: int) -> None:
    """At least so many events, the first of them requests that nobody answers."""
    store = EventStore.open(settings)
    log = LongLog(store)
    log.wait("tenant-0", NUM_PENDING)
    tenant = 0
    while store.head() < num_events:
        log.fill(f"tenant-{tenant % NUM_TENANTS}", 32, STEPS_PER_LIFE)
        tenant += 1
    store.close()


@contextmanager
def serving(settings: Settings) -> Iterator[tuple[ServerProcess, float]]:
    """A server, and the seconds it took to be ready."""
    server = ServerProcess(Path(settings.data_dir), OPTIONS)
    began = time.perf_counter()
    with server:
        yield server, time.perf_counter() - began


async def _start_executor(settings: Settings) -> float:
    host = ExecutorHost(settings)
    began = time.perf_counter()
    await host.start()
    took_s = time.perf_counter() - began
    await host.link.stop(1.0)
    return took_s
