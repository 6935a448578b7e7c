"""Checkpoints: save, list, show, download, load."""

from collections.abc import AsyncIterator
from typing import Annotated

from litestar import Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody, QueryParameter
from litestar.response import Stream

from tinkerbell import wire
from tinkerbell.api import archive, validation, views
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.paging import AfterId, Limit, Offset
from tinkerbell.api.problems import problems
from tinkerbell.api.submissions import Submitter
from tinkerbell.errors import InvalidRequest
from tinkerbell.events.rows import CheckpointRow
from tinkerbell.types import TenantId

_TAGS = ["checkpoints"]


@post(
    "/adapters/{adapter_id:str}/checkpoints",
    status_code=202,
    operation_id="save",
    summary="Keep an adapter as a checkpoint",
    tags=_TAGS,
    responses=problems(404, 409, 413, 415, 429, 503),
)
async def save(
    adapter_id: FromPath[str], data: JSONBody[wire.Save], submitter: NamedDependency[Submitter]
) -> wire.Future:
    """Weights and optimizer as they are at this place among the adapter's requests."""
    return await submitter.save(adapter_id, data)


@post(
    "/adapters/{adapter_id:str}/load",
    status_code=202,
    operation_id="load",
    summary="Put a checkpoint in an adapter's place",
    tags=_TAGS,
    responses=problems(404, 409, 413, 415, 429, 503),
)
async def load(
    adapter_id: FromPath[str], data: JSONBody[wire.Load], submitter: NamedDependency[Submitter]
) -> wire.Future:
    """The checkpoint must have the adapter's rank, alpha and targets; accumulated gradients are cleared."""
    return await submitter.load(adapter_id, data)


@get(
    "/adapters/{adapter_id:str}/checkpoints",
    operation_id="list_checkpoints_of_adapter",
    summary="An adapter's checkpoints",
    tags=_TAGS,
    responses=problems(404),
)
async def list_checkpoints_of_adapter(
    adapter_id: FromPath[str],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    limit: Limit = 1000,
    offset: Offset = 0,
    after: AfterId = None,
) -> list[wire.Checkpoint]:
    """Oldest first."""

    def read() -> list[CheckpointRow]:
        queries = context.store.queries
        if queries.adapter(principal.tenant, validation.adapter_id(adapter_id)) is None:
            raise validation.no_adapter(adapter_id)
        last = None if after is None else _saved(context, principal.tenant, after)
        return queries.checkpoints(principal.tenant, adapter_id, after=last, offset=offset, limit=limit)

    return [views.checkpoint(row) for row in await context.read(principal.tenant, read)]


@get(
    "/checkpoints",
    operation_id="list_checkpoints",
    summary="Your checkpoints",
    tags=_TAGS,
    responses=problems(404),
)
async def list_checkpoints(
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    limit: Limit = 1000,
    offset: Offset = 0,
    after: AfterId = None,
) -> list[wire.Checkpoint]:
    """Oldest first, of all adapters, also of removed ones."""

    def read() -> list[CheckpointRow]:
        last = None if after is None else _saved(context, principal.tenant, after)
        return context.store.queries.checkpoints(principal.tenant, after=last, offset=offset, limit=limit)

    return [views.checkpoint(row) for row in await context.read(principal.tenant, read)]


def _saved(context: Context, tenant: TenantId, checkpoint_id: str) -> CheckpointRow:
    row = context.store.queries.checkpoint(tenant, validation.checkpoint_id(checkpoint_id))
    if row is None or row.kind != "save":
        raise validation.no_checkpoint(checkpoint_id)
    return row


async def _row(context: Context, principal: Principal, checkpoint_id: str) -> CheckpointRow:
    return await context.read(principal.tenant, _saved, context, principal.tenant, checkpoint_id)


@get(
    "/checkpoints/{checkpoint_id:str}",
    operation_id="show_checkpoint",
    summary="A checkpoint",
    tags=_TAGS,
    responses=problems(404),
)
async def show_checkpoint(
    checkpoint_id: FromPath[str], context: NamedDependency[Context], principal: NamedDependency[Principal]
) -> wire.Checkpoint:
    """Where it is from and what it holds."""
    return views.checkpoint(await _row(context, principal, checkpoint_id))


@get(
    "/checkpoints/{checkpoint_id:str}/download",
    operation_id="download_checkpoint",
    summary="A checkpoint as a tar of a PEFT directory",
    tags=_TAGS,
    media_type=archive.MEDIA_TYPE,
    responses=problems(404, 410),
)
async def download_checkpoint(
    checkpoint_id: FromPath[str],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    optimizer: Annotated[bool, QueryParameter(description="Adam's moments as well.")] = False,
) -> Stream:
    """Unpack it and give the directory to `PeftModel.from_pretrained`. `AutoPeftModelForCausalLM.from_pretrained` loads
    the base model, too, that `base_model_name_or_path` of its adapter_config.json names: a hub id, or a directory of
    the server's machine. Of a directory callers elsewhere get the name only: put there where you have that model,
    whose `hash` is in `GET /v1/models`.

    An adapter on the head (target `unembed` or lm_head) of a model whose head is its embedding has to be untied before
    it is merged: docs/how-to/take-an-adapter-away.md."""
    row = await _row(context, principal, checkpoint_id)
    files = archive.files_of(row, with_optimizer=optimizer)
    if optimizer and archive.OPTIMIZER not in files:
        raise InvalidRequest(f"Checkpoint {checkpoint_id} was kept without its optimizer.")
    # Before the first byte is sent, while there can be a problem instead.
    await context.read(principal.tenant, context.store.require_blobs, files.values())

    async def chunks() -> AsyncIterator[bytes]:
        for name, digest in files.items():
            content = await context.read(principal.tenant, context.store.blob, digest)
            content = archive.shown(name, content, here=context.gate.loopback)
            for chunk in archive.entry(f"{row.id}/{name}", content, at_us=row.created_us):
                yield chunk
        yield archive.END

    headers = {"Content-Disposition": f'attachment; filename="{row.id}.tar"'}
    return Stream(chunks(), media_type=archive.MEDIA_TYPE, headers=headers)


router = Router(
    path="/",
    route_handlers=[
        save,
        load,
        list_checkpoints_of_adapter,
        list_checkpoints,
        show_checkpoint,
        download_checkpoint,
    ],
)
