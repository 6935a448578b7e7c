"""What a benchmark ran on: numbers mean nothing without it."""

import os
import platform
import sqlite3
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import msgspec

SYNC_BYTES = 4096
NUM_SYNCS = 50


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Facts that decide a benchmark's numbers."""

    cpu: str
    num_cores: int
    """Those this process may use."""
    memory_gib: float
    system: str
    python: str
    sqlite: str
    tinkerbell: str
    fdatasync_ms: float
    """Median time of appending 4 KiB to a file in the benchmark's directory and syncing it."""
    load_average: float
    """Of the last minute, before the benchmark began."""


def describe(directory: Path) -> Machine:
    """Look at this machine, and at the disk under `directory`."""
    return Machine(
        cpu=_cpu(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        sqlite=sqlite3.sqlite_version,
        tinkerbell=version("tinkerbell-server"),
        fdatasync_ms=round(_fdatasync_ms(directory), 3),
        load_average=round(os.getloadavg()[0], 2),
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _fdatasync_ms(directory: Path) -> float:
    file = directory / "fdatasync.probe"
    sync = getattr(os, "fdatasync", os.fsync)
    times = []
    with file.open("wb", buffering=0) as stream:
        for _ in range(NUM_SYNCS):
            began = time.perf_counter()
            stream.write(b"\0" * SYNC_BYTES)
            sync(stream.fileno())
            times.append(time.perf_counter() - began)
    file.unlink()
    return statistics.median(times) * 1e3
