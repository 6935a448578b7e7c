"""Configuration of clients, capabilities, sessions, telemetry."""

import re
from typing import Any

from litestar import Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from tinkerbell.api.auth import PUBLIC, Principal
from tinkerbell.api.context import Context
from tinkerbell.api.requests import ApiRequest
from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker.base import served_names
from tinkerbell.api.tinker.dependencies import Submit
from tinkerbell.errors import InvalidRequest

OLDEST = (0, 25)
"""Before it the SDK spoke JSON only."""

_RELEASE = re.compile(r"([0-9]{1,6})\.([0-9]{1,6})(\.|$)")

MAX_CONCURRENT_SAMPLES = 256
"""Each one that a client waits for holds a connection."""


@post("/client/config", status_code=200)
async def client_config(data: JSONBody[m.ClientConfig]) -> dict[str, Any]:
    """How a client is to behave. Refuses those that speak another protocol."""
    version = _version(data.sdk_version)
    if version is not None and version < OLDEST:
        raise InvalidRequest(
            f"tinker {data.sdk_version} sends JSON where this server reads protobuf; install tinker>=0.25"
            " (pip install 'tinker>=0.25')."
        )
    return {
        "sample_max_concurrent_requests": MAX_CONCURRENT_SAMPLES,
        # With it tinker 0.38.0 now and then aborts when its process ends, the last poll still under way.
        "sample_use_retrieve_futures": False,
        "sample_join_sampling_session": True,
        "parallel_fwdbwd_chunks": True,
    }


@post("/client/dynamic_config", status_code=200)
async def dynamic_config(data: JSONBody[m.ClientConfig]) -> dict[str, Any]:
    """The SDK says when nobody waits for a sample any more."""
    return {"sample_cancel_enabled": True}


@get("/healthz", opt=PUBLIC)
async def healthz() -> dict[str, str]:
    """Whether it answers."""
    return {"status": "ok"}


@get("/get_server_capabilities")
async def capabilities(context: NamedDependency[Context], principal: NamedDependency[Principal]) -> dict[str, Any]:
    """The one model, under each of its names."""
    model = await context.read(principal.tenant, context.model)
    return {
        "supported_models": [
            {"model_name": name, "max_context_length": model.max_length, "trainable": True, "sampleable": True}
            for name in served_names(model)
        ]
    }


@post("/create_session", status_code=200)
async def create_session(
    data: JSONBody[m.CreateSession], request: ApiRequest, submit: NamedDependency[Submit]
) -> dict[str, Any]:
    """What is made within it has ids that begin with its own."""
    key = request.headers.get("x-idempotency-key")
    session = await submit(key).create_session(data, f"tinker/{data.sdk_version}")
    return {
        "type": "create_session",
        "session_id": session,
        "info_message": None,
        "warning_message": None,
        "error_message": None,
    }


@post("/session_heartbeat", status_code=200)
async def session_heartbeat(data: JSONBody[m.Heartbeat], submit: NamedDependency[Submit]) -> dict[str, str]:
    """A session that is not heard of expires. 410 ends the client's heartbeats."""
    await submit(None).hear_of_session(data.session_id)
    return {"type": "session_heartbeat"}


@post("/sessions/{session_id:str}/finish", status_code=204)
async def finish_session(
    session_id: FromPath[str], data: JSONBody[m.FinishSession], submit: NamedDependency[Submit]
) -> None:
    """Its adapters leave the executor; what was saved stays."""
    await submit(None).finish_session(session_id, data.reason.type, data.detail)


@post("/telemetry", status_code=200)
async def telemetry() -> dict[str, str]:
    """Accepted and dropped."""
    return {"status": "accepted"}


def _version(text: str) -> tuple[int, int] | None:
    """(major, minor); None for what is no release."""
    match = _RELEASE.match(text)
    return None if match is None else (int(match[1]), int(match[2]))


router = Router(
    path="/",
    route_handlers=[
        client_config,
        dynamic_config,
        healthz,
        capabilities,
        create_session,
        session_heartbeat,
        finish_session,
        telemetry,
    ],
)
