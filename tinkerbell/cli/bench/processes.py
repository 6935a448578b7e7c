"""CPU time and memory of other processes, from Linux's /proc."""

import os
from pathlib import Path

import click

from tinkerbell.cli.bench.memory import reset_peak, resident_peak_bytes

_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_USER_TIME, _SYSTEM_TIME = 11, 12
"""Of the fields after the command's name in /proc/PID/stat, proc(5)."""


def require_proc() -> None:
    """Raises a usage error where other processes cannot be measured."""
    if not Path("/proc/self/stat").exists():
        raise click.UsageError("this benchmark reads the server's CPU time from /proc, which only Linux has")


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its descendants so far; the system counts in hundredths."""
    return sum(_ticks(member) for member in family(pid)) / _TICKS_PER_S


def reset_peaks(pid: int) -> None:
    """Let the peak resident sizes of a process and its descendants begin anew, where the system does that."""
    for member in family(pid):
        reset_peak(member)


def peak_rss_bytes(pid: int) -> int:
    """Sum of the peak resident sizes of a process and its descendants; what they share counts for each."""
    return sum(resident_peak_bytes(member) for member in family(pid))


def _ticks(pid: int) -> int:
    # The command's name is in parentheses and may contain any character.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[_USER_TIME]) + int(fields[_SYSTEM_TIME])
