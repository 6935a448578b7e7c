"""A Postgres server for one run: made from the installed binaries, reached by a Unix socket, gone afterwards."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tinkerbell.errors import MissingPackage, ServerError

START_S = 60
HOW_TO_INSTALL = (
    "the Postgres server binaries (initdb, pg_ctl) are not on PATH, in /usr/lib/postgresql or where pg_config says;"
    " install them with `apt-get install postgresql` (Debian, Ubuntu), `dnf install postgresql-server` (Fedora)"
    " or `brew install postgresql` (macOS)"
)


class ScratchPostgres(msgspec.Struct, frozen=True):
    """A running server."""

    directory: Path
    """Holds its data, its log and its socket."""

    def url(self, database: str = "postgres") -> str:
        """SQLAlchemy URL of a database of this server."""
        return f"postgresql+psycopg://postgres@/{database}?host={self.directory}"


def find_binaries() -> Path:
    """Directory of initdb and pg_ctl. Raises MissingPackage, which says how to install them."""
    candidates = []
    if (found := shutil.which("initdb")) is not None:
        candidates.append(Path(found).resolve().parent)
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    candidates += sorted(versions, key=lambda path: [int(n) for n in path.parent.name.split(".") if n.isdigit()])[::-1]
    if (pg_config := shutil.which("pg_config")) is not None:
        told = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        candidates.append(Path(told.stdout.strip()))
    for directory in candidates:
        if (directory / "initdb").exists() and (directory / "pg_ctl").exists():
            return directory
    raise MissingPackage(HOW_TO_INSTALL)


@contextmanager
def scratch_postgres(*, durable: bool = True) -> Iterator[ScratchPostgres]:
    """A server with an empty cluster in a temporary directory, stopped and removed at the end.

    It listens on a Unix socket in that directory only. `durable` False turns fsync off: for tests, never for
    numbers. As root it runs as the user `postgres` or, without one, `nobody`: Postgres refuses to run as root.
    Raises MissingPackage without the binaries, ServerError with the server's log when it does not start.
    """
    binaries = find_binaries()
    # A socket's path may have 107 bytes at most, so not under a long TMPDIR.
    directory = Path(tempfile.mkdtemp(prefix="tinkerbell-pg-", dir="/tmp" if Path("/tmp").is_dir() else None))
    identity = _identity(directory)
    data, log = directory / "data", directory / "log"
    try:
        initdb = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-locale", "--no-sync"]
        _run([str(binaries / "initdb"), f"--pgdata={data}", *initdb], directory, identity, log)
        options = f"-c listen_addresses='' -c unix_socket_directories='{directory}' -c port=5432 -c max_connections=200"
        if not durable:
            options += " -c fsync=off -c full_page_writes=off"
        control = [str(binaries / "pg_ctl"), f"--pgdata={data}", f"--timeout={START_S}", "--wait"]
        _run([*control, f"--log={log}", f"--options={options}", "start"], directory, identity, log)
        try:
            yield ScratchPostgres(directory)
        finally:
            _run([*control, "--mode=immediate", "stop"], directory, identity, log)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _identity(directory: Path) -> dict[str, Any]:
    """Arguments of subprocess.run that make the server's processes belong to an unprivileged user."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        os.chown(directory, user.pw_uid, user.pw_gid)
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise ServerError("Postgres does not run as root, and there is no user postgres or nobody to run it as")


def _run(command: Sequence[str], directory: Path, identity: dict[str, Any], log: Path) -> None:
    # The server inherits what is open: a pipe would never end, so its output goes to a file.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            command, cwd=directory, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False, **identity
        )
        if done.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace")
            said += log.read_text(errors="replace") if log.exists() else ""
            raise ServerError(f"{Path(command[0]).name} failed: {said.strip()[-2000:]}")
