"""docs/reference says what the code says."""

import subprocess
import sys
from pathlib import Path

from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]


def test_reference_is_in_step() -> None:
    script = ROOT / "docs" / "generate_reference.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], check=False, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nrun: make reference"
