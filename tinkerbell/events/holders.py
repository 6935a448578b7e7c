"""Names of lease holders, from which another process on the same machine can tell that a holder has ended.

A lease is normally over when it has expired. After `kill -9` and a restart on the same machine there is nothing to wait
for: the kernel knows that the process is gone. Being wrong would cost no more than a leadership: the next epoch fences
whatever the earlier holder still says.
"""

import os
import secrets
import socket
from pathlib import Path

import msgspec

_PROC = Path("/proc")
_FIELDS_BEFORE_START = 19
"""Fields of /proc/PID/stat between the state and the start time (proc(5): fields 3 and 22)."""


class _Process(msgspec.Struct, frozen=True):
    """One process of one boot, as only processes of the same PID namespace can look it up."""

    pid: int
    started: int
    """Clock ticks since boot: tells two processes with one PID apart."""
    system: str
    """Boot and PID namespace."""


def name_this_process(role: str = "") -> str:
    """A name no other holder has or will have: `HOST:PID:STARTED:SYSTEM:RANDOM`, with `role` and a space before it."""
    own = _this_process()
    started, system = (str(own.started), own.system) if own is not None else ("-", "-")
    # Names of hosts can have anything but this.
    host = socket.gethostname().replace(":", "_")
    name = f"{host}:{os.getpid()}:{started}:{system}:{secrets.token_hex(4)}"
    return f"{role} {name}" if role else name


def has_ended(holder: str) -> bool:
    """Whether the process with this name ran on this machine and is gone. False where nobody here can know: on another
    machine, in another container, before another boot, or on a system without /proc."""
    process, own = _parse(holder), _this_process()
    if process is None or own is None or process.system != own.system:
        return False
    return _running_since(process.pid) != process.started


def _parse(holder: str) -> _Process | None:
    parts = holder.split(":")
    if len(parts) != 5 or not (parts[1].isdigit() and parts[2].isdigit()):
        return None
    return _Process(int(parts[1]), int(parts[2]), parts[3])


def _this_process() -> _Process | None:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip().replace("-", "")
        namespace = (_PROC / "self/ns/pid").readlink().name
    except OSError:
        return None
    started = _running_since(os.getpid())
    if started is None:
        return None
    return _Process(os.getpid(), started, f"{boot}.{''.join(filter(str.isdigit, namespace))}")


def _running_since(pid: int) -> int | None:
    """When the process started; None where there is none, or only what its parent has not collected yet."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses can hold spaces and parentheses itself.
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZXx" else int(rest[_FIELDS_BEFORE_START - 1])
