"""A server in a process of its own, on loopback: for benchmarks, the demo and tests."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tinkerbell.errors import ServerError
from tinkerbell.files import make_directory, open_private

STOP_S = 10.0
LOG_TAIL_BYTES = 2000
POLL_S = 0.02


class ServerProcess:
    """`tinkerbell serve` on a free loopback port, its log in `<data_dir>/server.log`.

    Use as a context manager: entering starts it and returns when it is ready (ServerError with the end of its
    log if it is not within `ready_s`); leaving ends it with SIGTERM, and with SIGKILL if that takes longer
    than STOP_S.
    """

    def __init__(
        self,
        data_dir: Path,
        options: Sequence[str] = (),
        *,
        environment: Mapping[str, str] | None = None,
        ready_s: float = 60.0,
    ) -> None:
        self.data_dir = data_dir
        self.log_file = data_dir / "server.log"
        self._ready_file = data_dir / f"ready-{os.urandom(4).hex()}.json"
        self._arguments = [
            "--data-dir",
            str(data_dir),
            "--port",
            "0",
            "--ready-file",
            str(self._ready_file),
            *options,
        ]
        self._environment = {**os.environ, **(environment or {})}
        self._ready_s = ready_s
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> "ServerProcess":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def spawn(self) -> None:
        """Start the process without waiting for it."""
        make_directory(self.data_dir)
        with open_private(self.log_file, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tinkerbell", "serve", *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
            )

    def start(self) -> None:
        """Start it and wait until it takes requests."""
        self.spawn()
        deadline = time.monotonic() + self._ready_s
        while not self._ready_file.exists():
            if self.returncode is not None or time.monotonic() > deadline:
                status = self.returncode
                self.kill()
                what = "is not ready" if status is None else f"ended with status {status}"
                raise ServerError(f"The server {what}; its log ends with:\n{self.log_tail()}")
            time.sleep(POLL_S)
        self.url = json.loads(self._ready_file.read_text())["url"]
        self._ready_file.unlink()

    @property
    def pid(self) -> int:
        """Process id; the server must have been started."""
        assert self._process is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status; None while it runs."""
        return None if self._process is None else self._process.poll()

    def terminate(self) -> None:
        """Ask it to stop, and return at once."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int:
        """Exit status. Raises subprocess.TimeoutExpired if it still runs after `timeout_s`."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def stop(self) -> int | None:
        """End it, politely first; its exit status, None if it never ran."""
        if self._process is None:
            return None
        self.terminate()
        try:
            return self.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int | None:
        """SIGKILL: what a power cut of this one process looks like. Its executor ends by itself."""
        if self._process is None:
            return None
        self._process.kill()
        return self._process.wait()

    def log_tail(self) -> str:
        """The last lines it wrote."""
        return self.log_file.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
