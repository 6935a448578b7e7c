"""The commands that read and write the log of a server that does not run."""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tinkerbell.cli.main import COMMANDS, run
from tinkerbell.config import Settings
from tinkerbell.events import kinds
from tinkerbell.events.kinds import NewEvent
from tinkerbell.events.quotas import NAMES
from tinkerbell.events.store import EventStore
from tinkerbell.types import LoraConfig, SamplingParams

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command on the log in tmp_path: exit status, standard output, standard error."""

    def call(*args: str) -> tuple[int, str, str]:
        try:
            status = run([*args, "--data-dir", str(tmp_path / "data")])
        except SystemExit as exc:
            status = int(exc.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=str(tmp_path / "data"))


def answer_a_sample(settings: Settings, tenant: str = "alice", adapter: str = "ad_a") -> None:
    """One adapter that was made, and one sample of it that was answered for 1500 us."""
    stream = f"adapter/{adapter}"
    lora = kinds.AddLoraRequested(base_model="fake", lora=LoraConfig(), seed=1)
    sample = kinds.SampleRequested(params=SamplingParams(), num_tokens=3)
    store = EventStore.open(settings)
    try:
        [added] = store.append(NewEvent(event=lora, tenant=tenant, adapter=adapter, stream=stream))
        store.append(
            NewEvent(
                event=kinds.AddLoraCompleted(num_parameters=1, step=0, state_digest="d"),
                tenant=tenant,
                adapter=adapter,
                stream=stream,
                causation=added.position,
            )
        )
        [asked] = store.append(
            NewEvent(event=sample, tenant=tenant, adapter=adapter, stream=stream, body=kinds.SampleBody(bytes(12)))
        )
        unit = kinds.PlannedUnit(asked.position, 0, 0)
        planned = kinds.BatchPlanned(batch="1.1", lane="sample", environment="e", units=[unit], estimated_us=1500)
        ran = kinds.BatchRan(batch="1.1", busy_us=1500, charges=[(asked.position, 1500)])
        for event in (planned, ran):
            store.append(NewEvent(event=event, tenant="system", stream="system/scheduler"))
        done = kinds.SampleCompleted(batch="1.1", step=0, num_prompt_tokens=3, num_sampled_tokens=0, cost_us=1500)
        store.append(
            NewEvent(
                event=done,
                tenant=tenant,
                adapter=adapter,
                stream=stream,
                body=kinds.SamplesBody([], None),
                causation=asked.position,
            )
        )
    finally:
        store.close()


def test_looking_makes_nothing(cli: Cli, tmp_path: Path) -> None:
    for command in (
        ("usage",),
        ("keys", "list"),
        ("audit", "verify"),
        ("tenants", "list"),
        ("audit", "events", "ad_a"),
    ):
        status, out, err = cli(*command)
        assert (status, out) == (1, "")
        assert "No log in" in err
    status, out, _ = cli("db", "status", "--json")
    assert (status, json.loads(out)["schema"]) == (1, "missing")
    assert not (tmp_path / "data").exists()


def test_db_upgrade_and_status(cli: Cli, settings: Settings) -> None:
    assert cli("db", "upgrade")[0] == 0
    assert cli("db", "status")[0] == 0
    assert cli("db", "upgrade")[0] == 0
    with closing(sqlite3.connect(Path(settings.data_dir) / "tinkerbell.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'older'")
    status, out, _ = cli("db", "status", "--json")
    assert (status, json.loads(out)["schema"]) == (1, "outdated")
    status, _, err = cli("usage")
    assert status == 1
    assert f"tinkerbell db upgrade --data-dir {settings.data_dir}" in err.replace("\n", "")


def test_keys(cli: Cli, settings: Settings) -> None:
    status, out, err = cli("keys", "create", "alice", "--note", "laptop")
    key = out.strip()
    assert status == 0
    prefix, key_id, secret = key.split("-", 2)
    assert prefix == "tb"
    assert len(secret) >= 43  # 256 bits in base64
    assert secret not in err
    row = json.loads(cli("keys", "list", "--json")[1])[0]
    assert (row["key_id"], row["tenant"], row["admin"], row["note"]) == (key_id, "alice", False, "laptop")
    assert secret not in cli("keys", "list")[1] + json.dumps(row)

    store = EventStore.open(settings)
    try:
        stored = store.queries.key(key_id)
    finally:
        store.close()
    assert stored is not None
    assert stored.key_hash == hashlib.sha256(secret.encode()).hexdigest()

    assert cli("keys", "revoke", key_id)[0] == 0
    assert cli("keys", "revoke", key_id)[0] == 0
    assert json.loads(cli("keys", "list", "--json")[1])[0]["revoked_us"] is not None
    status, _, err = cli("keys", "revoke", "k_nobody")
    assert status == 1
    assert "No key k_nobody" in err


def test_admin_key_as_json(cli: Cli) -> None:
    made = json.loads(cli("keys", "create", "root", "--admin", "--json")[1])
    assert made["admin"] is True
    assert made["key"].startswith(f"tb-{made['key_id']}-")


@pytest.mark.parametrize("name", ["", "a b", "-x", "system", "ä", "x" * 65, "../etc"])
def test_names_that_no_tenant_can_have(cli: Cli, name: str, tmp_path: Path) -> None:
    assert cli("keys", "create", "--", name)[0] == 2
    assert not (tmp_path / "data").exists()


def test_tenants(cli: Cli, settings: Settings) -> None:
    cli("db", "upgrade")
    assert cli("tenants", "set", "alice", "--weight", "2", "--max-pending-requests", "20")[0] == 0
    assert cli("tenants", "set", "alice", "--max-adapters", "3")[0] == 0
    [row] = json.loads(cli("tenants", "list", "--json")[1])
    assert (row["tenant"], row["weight"]) == ("alice", 2.0)
    assert (row["max_pending_requests"], row["max_pending_tokens"], row["max_adapters"]) == (20, None, 3)
    assert row["used"]["pending_requests"] == 0
    assert row["used"]["stored_bytes"] > 0
    shown = json.loads(cli("tenants", "show", "alice", "--json")[1])
    assert [each["what"] for each in shown["quotas"]] == list(NAMES)
    assert shown["quotas"][2] == {"what": "adapters", "used": 0, "limit": 3, "own": True}
    assert "0 of 20" in cli("tenants", "list")[1]
    assert "adapters" in cli("tenants", "show", "alice")[1]
    assert cli("tenants", "set", "alice")[0] == 2
    assert cli("tenants", "set", "alice", "--weight", "0")[0] == 2
    assert cli("tenants", "set", "alice", "--weight", "nan")[0] == 2


def test_usage(cli: Cli, settings: Settings) -> None:
    cli("db", "upgrade")
    answer_a_sample(settings)
    rows: list[dict[str, Any]] = json.loads(cli("usage", "--json")[1])
    [row] = [row for row in rows if row["kind"] == "sample"]
    assert (row["tenant"], row["adapter"], row["num_requests"], row["cost_us"]) == ("alice", "ad_a", 1, 1500)
    assert json.loads(cli("usage", "--tenant", "bob", "--json")[1]) == []
    assert "total" in cli("usage")[1]


def test_audit_events(cli: Cli, settings: Settings) -> None:
    cli("db", "upgrade")
    answer_a_sample(settings)
    lines = [json.loads(line) for line in cli("audit", "events", "ad_a", "--json")[1].splitlines()]
    assert [line["type"] for line in lines] == [
        "add_lora.requested",
        "add_lora.completed",
        "sample.requested",
        "sample.completed",
    ]
    assert lines[3]["causation"] == lines[2]["position"]
    assert lines[3]["data"]["cost_us"] == 1500
    after = cli("audit", "events", "ad_a", "--after", str(lines[1]["position"]), "--json")[1]
    assert len(after.splitlines()) == 2
    assert "sample.completed" in cli("audit", "events", "ad_a")[1]
    assert cli("audit", "events", "ad_b")[0] == 1


def test_audit_seal(cli: Cli, settings: Settings) -> None:
    cli("db", "upgrade")
    status, _, err = cli("audit", "seal")
    assert status == 1 and "empty" in err
    answer_a_sample(settings)
    status, out, _ = cli("audit", "seal")
    root, _, position = out.strip().partition("@")
    assert status == 0 and len(root) == 64 and cli("audit", "seal")[1] == out, "nothing has happened in between"
    assert json.loads(cli("audit", "seal", "--json")[1])["position"] == int(position)
    assert cli("audit", "verify", "--seal", out.strip())[0] == 0
    assert cli("audit", "verify", "--seal", root.upper())[0] == 0
    status, _, err = cli("audit", "verify", "--seal", f"{root[::-1]}@{position}")
    assert status == 1 and "I15" in err
    assert cli("audit", "verify", "--seal", "nonsense")[0] == 2


def test_audit_verify_names_what_is_wrong(cli: Cli, settings: Settings) -> None:
    cli("db", "upgrade")
    answer_a_sample(settings)
    status, out, _ = cli("audit", "verify", "--json")
    assert (status, json.loads(out)["ok"]) == (0, True)
    assert cli("db", "check")[0] == 0
    with closing(sqlite3.connect(Path(settings.data_dir) / "tinkerbell.db")) as database, database:
        database.execute("UPDATE usage SET cost_us = cost_us + 1 WHERE kind = 'sample'")
    status, out, _ = cli("audit", "verify", "--json")
    assert (status, json.loads(out)["ok"]) == (1, False)
    status, _, err = cli("audit", "verify")
    assert status == 1
    assert "usage" in err


@pytest.mark.parametrize(
    "args",
    [
        ["no-such-command"],
        ["serve", "--port", "70000"],
        ["serve", "--executor-option", "novalue"],
        ["serve"],
        ["keys", "create"],
        ["top", "--interval", "0"],
    ],
)
def test_wrong_usage_is_status_2(args: list[str]) -> None:
    assert run(args) == 2


def test_settings_file_that_is_wrong(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("port = 'many'\n")
    status, _, err = cli("usage", "--config", str(file))
    assert status == 2
    assert "port" in err


def test_top_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    # Port 9 (discard) of this machine: nothing listens there.
    assert run(["top", "--once", "--url", "http://127.0.0.1:9"]) == 1
    assert "127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert f"tinkerbell {command}" in capsys.readouterr().out.partition("Usage:")[2].partition("\n")[2]


def test_a_limit_goes_back_to_the_servers_setting(cli: Cli) -> None:
    cli("db", "upgrade")
    status, out, _ = cli("tenants", "set", "alice", "--max-adapters", "3", "--json")
    assert (status, json.loads(out)["max_adapters"]) == (0, 3)
    status, out, _ = cli("tenants", "set", "alice", "--max-adapters", "default", "--json")
    assert (status, json.loads(out)["max_adapters"]) == (0, None)
    assert cli("tenants", "set", "alice", "--max-adapters", "few")[0] == 2


def test_changes_say_what_they_did_as_json(cli: Cli) -> None:
    assert json.loads(cli("db", "upgrade", "--json")[1])["schema"] == "current"
    key_id = json.loads(cli("keys", "create", "alice", "--json")[1])["key_id"]
    assert json.loads(cli("keys", "revoke", key_id, "--json")[1]) == {
        "key_id": key_id,
        "tenant": "alice",
        "revoked": True,
    }


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("tenants", "set", "alice", "--max-adapters", "99999999999999999999"), 2),
        (("audit", "events", "ad_a", "--after", "99999999999999999999"), 2),
        (("keys", "create", "alice", "--note", "\udcff"), 1),
        (("db", "upgrade", "--database-url", "sqlite:////dev/null/no/tinkerbell.db"), 1),
        (("db", "status", "--database-url", "postgresql://nobody@127.0.0.1:9/none"), 1),
        (("db", "upgrade", "--database-url", "postgresql://nobody@127.0.0.1:9/none"), 1),
    ],
)
def test_what_cannot_be_done_is_one_line_and_no_traceback(cli: Cli, command: tuple[str, ...], status: int) -> None:
    cli("db", "upgrade")
    ended, out, err = cli(*command)
    assert (ended, out) == (status, "")
    assert err and "Traceback" not in err


@pytest.mark.parametrize("command", [("db", "status"), ("db", "upgrade"), ("audit", "verify"), ("usage",)])
def test_a_file_that_is_no_database_is_one_line_and_stays_as_it_is(
    cli: Cli, tmp_path: Path, command: tuple[str, ...]
) -> None:
    path = tmp_path / "notes.db"
    path.write_text("these are no tables, " * 1000)
    ended, _, err = cli(*command, "--database-url", f"sqlite:///{path}")
    assert ended == 1
    assert err and "Traceback" not in err
    assert path.read_text().startswith("these are no tables")
