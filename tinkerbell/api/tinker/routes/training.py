"""Models: make, train, save, load."""

from typing import Any

from litestar import Router, post
from litestar.di import NamedDependency
from litestar.exceptions import HTTPException
from litestar.params import JSONBody

from tinkerbell.api import validation
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.requests import CARRIES_DATA, ApiRequest
from tinkerbell.api.tinker import codec, protobuf
from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker.base import base_model
from tinkerbell.api.tinker.dependencies import Submit
from tinkerbell.errors import InvalidRequest, shown


@post("/create_model", status_code=200)
async def create_model(data: JSONBody[m.CreateModel], submit: NamedDependency[Submit]) -> m.Submitted:
    """A new adapter."""
    return await submit(f"{data.session_id}:train:{data.model_seq_id}").create_model(data)


@post("/get_info", status_code=200)
async def get_info(
    data: JSONBody[m.GetInfo], context: NamedDependency[Context], principal: NamedDependency[Principal]
) -> dict[str, Any]:
    """What a model is."""
    queries = context.store.queries
    row = await context.read(principal.tenant, queries.adapter, principal.tenant, validation.adapter_id(data.model_id))
    if row is None:
        raise validation.no_adapter(data.model_id)
    model = await context.read(principal.tenant, context.model)
    name = base_model(model)
    return {
        "type": "get_info",
        "model_id": row.id,
        "is_lora": True,
        "lora_rank": row.lora.rank,
        "model_name": name,
        "optimizer_config": {"type": "adamw"},
        "model_data": {"arch": None, "model_name": name, "tokenizer_id": model.tokenizer or None},
    }


@post("/forward_backward", status_code=200, opt=CARRIES_DATA)
async def forward_backward(
    request: ApiRequest, context: NamedDependency[Context], submit: NamedDependency[Submit]
) -> m.Submitted:
    """Also what is called forward, with `forward_only`."""
    media_type = request.content_type[0]
    if media_type != codec.MEDIA_TYPE:
        raise HTTPException(
            status_code=415,
            detail=f"Send the body as {codec.MEDIA_TYPE}, not {media_type or 'untyped'}; tinker>=0.25 does.",
        )
    raw, submits, tenant = await request.body(), context.threads.submits, request.user.tenant
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "zstd":
        compressed_bytes = len(raw)
        raw = await submits.run(tenant, protobuf.decompress, raw, context.settings.limits.max_body_bytes)
        context.shares.hold_bytes(request.scope, compressed_bytes + len(raw))
    elif encoding != "identity":
        raise HTTPException(status_code=415, detail=f"The content-encoding {shown(encoding)} is not zstd.")
    body = await submits.run(tenant, protobuf.forward_backward, raw)
    return await submit(f"{body.model_id}:{body.seq_id}").forward_backward(body)


@post("/optim_step", status_code=200)
async def optim_step(data: JSONBody[m.OptimStep], submit: NamedDependency[Submit]) -> m.Submitted:
    """One AdamW step."""
    return await submit(f"{data.model_id}:{data.seq_id}").optim_step(data)


@post("/save_weights", status_code=200)
async def save_weights(data: JSONBody[m.SaveWeights], submit: NamedDependency[Submit]) -> m.Submitted:
    """Weights and optimizer, to train on."""
    return await submit(f"{data.model_id}:{data.seq_id}").save(data, external=False)


@post("/save_weights_external", status_code=200)
async def save_weights_external(data: JSONBody[m.SaveWeights], submit: NamedDependency[Submit]) -> m.Submitted:
    """Weights to be taken away."""
    return await submit(f"{data.model_id}:{data.seq_id}").save(data, external=True)


@post("/save_weights_for_sampler", status_code=200)
async def save_weights_for_sampler(
    data: JSONBody[m.SaveWeightsForSampler], submit: NamedDependency[Submit]
) -> m.Submitted:
    """Weights to sample from."""
    return await submit(f"{data.model_id}:{data.seq_id}").save_for_sampler(data)


@post("/load_weights", status_code=200)
async def load_weights(data: JSONBody[m.LoadWeights], submit: NamedDependency[Submit]) -> m.Submitted:
    """A saved state into a model, or as a new one."""
    if data.model_id is None:
        return await submit(f"{data.session_id}:train:{data.model_seq_id}").load_as_new(data)
    if data.seq_id is None:
        raise InvalidRequest("load_weights into a model needs seq_id.")
    return await submit(f"{data.model_id}:{data.seq_id}").load_into(data.model_id, data)


@post("/create_custom_loss", status_code=200)
async def create_custom_loss() -> None:
    """Not before losses of users run apart from everything else."""
    raise InvalidRequest(
        "Custom losses on the server are not enabled; forward_backward_custom with a callable computes the loss in the"
        " client."
    )


router = Router(
    path="/",
    route_handlers=[
        create_model,
        get_info,
        forward_backward,
        optim_step,
        save_weights,
        save_weights_external,
        save_weights_for_sampler,
        load_weights,
        create_custom_loss,
    ],
)
