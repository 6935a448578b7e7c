"""A server whose process may open few files, and sockets that take all of them: what was accepted still runs."""

import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from tinkerbell.cli.bench.client import RawClient, training_body
from tinkerbell.cli.process import ServerProcess

FILES = 400


class FewFiles(ServerProcess):
    """Started where no more than FILES can be open."""

    def spawn(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    "sh",
                    "-c",
                    f'ulimit -n {FILES}; ulimit -Sn {FILES // 2}; exec "$@"',
                    "sh",
                    sys.executable,
                    "-m",
                    "tinkerbell",
                    "serve",
                    *self._arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
            )


def test_sockets_leave_files_to_everything_else(tmp_path: Path) -> None:
    with FewFiles(tmp_path / "data", ["--executor", "fake"]) as server, ExitStack() as idle:
        host, port = server.url.removeprefix("http://").split(":")
        for _ in range(FILES + 200):
            idle.enter_context(socket.create_connection((host, int(port)), 20))
        client = RawClient(server.url)
        adapter = client.add_lora(seed=1)
        for _ in range(10):
            # Large enough for a file of its own.
            client.result(client.post(f"/v1/adapters/{adapter}/fwdbwd", training_body(4000, 40)))
        client.result(client.post(f"/v1/adapters/{adapter}/checkpoints", b"{}"))
        assert client.call("GET", "/healthz")["status"] == "ok"
        client.close()
    log = server.log_file.read_text()
    assert "Traceback" not in log
    assert "ERROR" not in log
