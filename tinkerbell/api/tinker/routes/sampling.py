"""Samplers, and sampling from them."""

from typing import Any

from litestar import Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker.base import base_model
from tinkerbell.api.tinker.dependencies import Submit
from tinkerbell.api.tinker.reading import path_of


@post("/create_sampling_session", status_code=200)
async def create_sampling_session(
    data: JSONBody[m.CreateSamplingSession], submit: NamedDependency[Submit]
) -> dict[str, str]:
    """The base model's weights, or those at a path."""
    sampler = await submit(None).create_sampler(data)
    return {"type": "create_sampling_session", "sampling_session_id": sampler}


@get("/samplers/{sampler_id:str}")
async def show_sampler(
    sampler_id: FromPath[str],
    submit: NamedDependency[Submit],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
) -> dict[str, Any]:
    """Where its weights are from."""

    def read() -> dict[str, Any]:
        row = submit(None).sampler(sampler_id)
        found = {"sampler_id": row.id, "base_model": base_model(context.model())}
        if row.checkpoint is not None:
            checkpoint = context.store.queries.checkpoint(principal.tenant, row.checkpoint)
            if checkpoint is not None and checkpoint.name is not None:
                found["model_path"] = str(path_of(checkpoint))
        return found

    return await context.read(principal.tenant, read)


@post("/join_sampling_session", status_code=200)
async def join_sampling_session(
    data: JSONBody[m.JoinSamplingSession], submit: NamedDependency[Submit]
) -> dict[str, str | int]:
    """Another client of a sampler, with samples of its own."""
    number = await submit(None).join_sampler(data.sampling_session_id)
    return {"type": "join_sampling_session", "client_counter": number}


@post("/asample", status_code=200)
async def asample(data: JSONBody[m.Asample], submit: NamedDependency[Submit]) -> m.Submitted:
    """Continuations of a prompt."""
    return await submit(f"{data.sampling_session_id}:{data.seq_id}").sample(data)


router = Router(path="/", route_handlers=[create_sampling_session, show_sampler, join_sampling_session, asample])
