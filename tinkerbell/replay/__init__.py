"""A run is a function of its log: executes it again, in an executor of its own, and compares.

Reads a server's database beside the server, or an exported run; changes neither.
"""

from tinkerbell.replay.archive import ArchiveLog, Manifest, export, unpack
from tinkerbell.replay.curves import Point
from tinkerbell.replay.diff import Diff, diff
from tinkerbell.replay.findings import Finding
from tinkerbell.replay.fork import Fork, fork
from tinkerbell.replay.log import DatabaseLog, Log
from tinkerbell.replay.session import ExecutorChoice
from tinkerbell.replay.state import StateAt, state_at, write_adapter
from tinkerbell.replay.verify import Report, verify
from tinkerbell.scheduler.environments import Difference, Tolerance

__all__ = [
    "ArchiveLog",
    "DatabaseLog",
    "Diff",
    "Difference",
    "ExecutorChoice",
    "Finding",
    "Fork",
    "Log",
    "Manifest",
    "Point",
    "Report",
    "StateAt",
    "Tolerance",
    "diff",
    "export",
    "fork",
    "state_at",
    "unpack",
    "verify",
    "write_adapter",
]
