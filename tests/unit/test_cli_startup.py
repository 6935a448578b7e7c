"""The command line answers at once: nothing heavy is imported before it is needed."""

import subprocess
import sys

import pytest

from tests.support.waiting import PATIENCE_S

PROBE = """
import sys
from tinkerbell.cli.main import run
status = run({args!r})
heavy = {{"torch", "transformers", "litestar", "sqlalchemy", "alembic", "numpy", "httpx"}} & set(sys.modules)
sys.exit(f"imported: {{sorted(heavy)}}" if heavy or status else 0)
"""


@pytest.mark.parametrize(
    "args",
    [
        ["--version"],
        ["--help"],
        ["serve", "--help"],
        ["keys", "--help"],
        ["replay", "--help"],
        ["replay", "verify", "--help"],
        ["replay", "fork", "--help"],
        ["bench", "train", "--help"],
        ["bench", "sample", "--help"],
        ["bench", "server", "--help"],
    ],
)
def test_nothing_heavy(args: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(args=args)], check=False, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
