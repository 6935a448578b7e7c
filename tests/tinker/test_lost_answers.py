"""Every answer to the SDK is lost once, and twice; its calls end as if none had been."""

import json
import re
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.contract.test_api_repeats import routes
from tests.support.api_driver import ApiDriver
from tests.support.server import fake_server
from tests.tinker.conftest import CLIENTS, TIMEOUT_S, Sdk
from tests.tinker.lossy import Loss, gateway
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore

pytestmark = [pytest.mark.tinker, pytest.mark.timeout(900)]

WAYS: list[tuple[Loss, int]] = [("closed", 1), ("closed", 2), ("502", 1), ("502", 2)]

NOT_CALLED = {
    "/api/v1/create_custom_loss",
    "/api/v1/join_sampling_session",
    "/api/v1/retrieve_futures",
    "/api/v1/cancel_future",
    "/api/v1/telemetry",
}
"""The client config of this server does not ask the SDK for these; tests/contract/test_api_repeats.py repeats them."""


def test_every_call_ends_as_if_no_answer_had_been_lost(
    sdk: Sdk, tmp_path: Path, settings: Settings, sqlite_store: EventStore
) -> None:
    wanted = posts(settings, sqlite_store) - NOT_CALLED
    with fake_server(tmp_path / "data") as server, ExitStack() as stack:
        expected = sdk.client("lossy", server.url, model="fake")
        gateways = [stack.enter_context(gateway(server.url, *way)) for way in WAYS]
        programs = [sdk.spawn([str(CLIENTS / "lossy.py")], each.url, model="fake") for each in gateways]
        for way, lossy, program in zip(WAYS, gateways, programs, strict=True):
            assert result(program) == expected, way
            posted = {kind.split()[1] for kind in lossy.lost if kind.startswith("POST")}
            assert posted == wanted, "clients/lossy.py makes a call of every kind"


def posts(settings: Settings, store: EventStore) -> set[str]:
    """POST routes of the protocol, as the gateway names them."""
    paths = [path for path in routes(ApiDriver(settings, store), "POST") if path.startswith("/api/v1/")]
    named = [path.replace("{kind:str}/{name:str}", "weights/state") for path in paths]
    return {re.sub(r"\{\w+_id:str\}", "*", path) for path in named}


def result(program: "subprocess.Popen[str]") -> Any:
    output, _ = program.communicate(timeout=TIMEOUT_S)
    assert program.returncode == 0, output[-6000:]
    return json.loads(output.strip().splitlines()[-1])
