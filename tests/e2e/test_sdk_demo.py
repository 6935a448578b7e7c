"""The demo as a command, on the toy model."""

import json
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from tinkerbell import replay
from tinkerbell.config import Settings
from tinkerbell.replay import DatabaseLog


def test_demo_smoke(tmp_path: Path) -> None:
    """The whole demo on the toy model: server, keys, four users, plots, bill."""
    command = [sys.executable, "-m", "tinkerbell", "demo", "--executor", "fake", "--steps", "3", "--json"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert [len(user["values"]) for user in report["users"]] == [3, 3, 3, 3]
    bill = {row[0]: row[4] for row in report["sql"][0]["rows"]}
    assert bill.keys() == {"keeper", "orders", "topics", "brief"}
    for user in report["users"]:
        assert user["cost_us"] <= 1e6 * bill[user["user"]] + 1
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "losses.html").read_text()
    assert "<svg" in page
    with closing(DatabaseLog.open(Settings(data_dir=str(tmp_path / "tinkerbell-demo-data")))) as log:
        for user in report["users"]:
            replayed = replay.verify(log, user["user"], samples=True)
            assert (replayed.verdict, replayed.findings) == ("equal", []), user["user"]
            assert len(replayed.points) == 3
    assert not re.search(r"(src|href)=.?https?:|url\((?!#)|@import", page), "the page must not load anything"
