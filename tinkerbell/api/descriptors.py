"""File descriptors: as many as the system gives, and some that connections leave to everything else."""

import logging
import resource

RESERVE = 256
"""For the database, keys, blobs and pipes, whatever connections there are."""

log = logging.getLogger("tinkerbell.server")


def raise_limit() -> None:
    """Let this process, and those it starts, open as many files as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            # Some systems have another limit below the one they name.
            log.info("open files stay at %d: %s", soft, error)


def most_connections(wanted: int) -> int:
    """`wanted`, or as many as leave the reserve; it is half of what there is where that is little."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    room = soft - min(RESERVE, soft // 2)
    if room < wanted:
        log.warning("%d connections at most, not %d: the process may open %d files", room, wanted, soft)
    return min(wanted, room)
