"""The peak memory of one call, over what the process held before."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_RESET_PEAK = "5"
"""Linux, proc(5): writing it sets the peak resident size to the present one."""


def peak_bytes(call: Callable[[], object]) -> int | None:
    """How far the resident size rose while `call` ran; None where the system cannot say."""
    gc.collect()
    _give_back()
    if not reset_peak("self"):
        call()
        return None
    before = _status("self", "VmRSS")
    call()
    return resident_peak_bytes("self") - before


def reset_peak(pid: int | str) -> bool:
    """Let a process's peak resident size begin anew; False where the system does not do that."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def resident_peak_bytes(pid: int | str) -> int:
    """The largest resident size a process has had since that was reset, or ever."""
    return _status(pid, "VmHWM")


def _give_back() -> None:
    """Return freed memory to the system: it would hide what the next call takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(pid: int | str, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)
