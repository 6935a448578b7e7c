"""The scratch Postgres server."""

import os
import subprocess
from pathlib import Path

import pytest
import sqlalchemy as sa

from tinkerbell.cli.bench import postgres
from tinkerbell.cli.bench.postgres import find_binaries, scratch_postgres
from tinkerbell.errors import MissingPackage, ServerError


def test_it_serves_and_leaves_nothing() -> None:
    with scratch_postgres() as server:
        engine = sa.create_engine(server.url(), poolclass=sa.NullPool)
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SHOW fsync").scalar() == "on"
            assert connection.exec_driver_sql("SHOW listen_addresses").scalar() == ""
        pid = int((server.directory / "data" / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, 0)
    assert not server.directory.exists()
    status = Path(f"/proc/{pid}/status")
    # Whoever adopted the process may not have taken notice of its end yet.
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_an_error_in_the_body_stops_it_too() -> None:
    with pytest.raises(KeyError), scratch_postgres(durable=False) as server:
        raise KeyError
    assert not server.directory.exists()


def test_missing_binaries_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres.shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    with pytest.raises(MissingPackage, match="apt-get install postgresql"), scratch_postgres():
        pass


def test_a_server_that_does_not_start_shows_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run

    def wrong_option(command: list[str], **options: object) -> object:
        changed = [part.replace("max_connections=200", "max_connections=many") for part in command]
        return real(changed, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", wrong_option)
    with pytest.raises(ServerError, match="max_connections"), scratch_postgres(durable=False):
        pass


def test_binaries_are_found() -> None:
    assert (find_binaries() / "initdb").exists()
