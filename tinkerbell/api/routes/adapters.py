"""Adapters: make, list, show, remove."""

from litestar import Router, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from tinkerbell import wire
from tinkerbell.api import validation, views
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.paging import AfterId, Limit, Offset
from tinkerbell.api.problems import problems
from tinkerbell.api.submissions import Submitter
from tinkerbell.events.rows import AdapterRow
from tinkerbell.types import AdapterId, TenantId

_TAGS = ["adapters"]


def page_of_adapters(
    context: Context, tenant: TenantId, after: AdapterId | None, offset: int, limit: int
) -> list[AdapterRow]:
    """Oldest first. Blocking. Raises NotFound for an `after` that is no adapter of the tenant."""
    queries = context.store.queries
    last = None if after is None else queries.adapter(tenant, validation.adapter_id(after))
    if after is not None and last is None:
        raise validation.no_adapter(after)
    return queries.adapters(tenant, after=last, offset=offset, limit=limit)


@post(
    "/adapters",
    status_code=202,
    operation_id="add_lora",
    summary="Make an adapter",
    tags=_TAGS,
    responses=problems(404, 409, 413, 415, 429, 503),
)
async def add_lora(data: JSONBody[wire.AddLora], submitter: NamedDependency[Submitter]) -> wire.Future:
    """Fresh from a seed, or from a checkpoint of yours. The future's `adapter_id` may be used at once:
    requests wait in order behind it."""
    return await submitter.add_lora(data)


@get("/adapters", operation_id="list_adapters", summary="Your adapters", tags=_TAGS, responses=problems(404))
async def list_adapters(
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    limit: Limit = 1000,
    offset: Offset = 0,
    after: AfterId = None,
) -> list[wire.Adapter]:
    """Oldest first; removed and failed ones as well: `state` tells."""

    def read() -> list[AdapterRow]:
        return page_of_adapters(context, principal.tenant, after, offset, limit)

    return [views.adapter(row) for row in await context.read(principal.tenant, read)]


@get(
    "/adapters/{adapter_id:str}",
    operation_id="show_adapter",
    summary="An adapter",
    tags=_TAGS,
    responses=problems(404),
)
async def show_adapter(
    adapter_id: FromPath[str], context: NamedDependency[Context], principal: NamedDependency[Principal]
) -> wire.Adapter:
    """Its settings, state, steps taken and last loss."""
    queries = context.store.queries
    row = await context.read(principal.tenant, queries.adapter, principal.tenant, validation.adapter_id(adapter_id))
    if row is None:
        raise validation.no_adapter(adapter_id)
    return views.adapter(row)


@delete(
    "/adapters/{adapter_id:str}",
    status_code=202,
    operation_id="remove_lora",
    summary="Remove an adapter",
    tags=_TAGS,
    responses=problems(404, 409, 429, 503),
)
async def remove_lora(adapter_id: FromPath[str], submitter: NamedDependency[Submitter]) -> wire.Future:
    """It leaves memory after what was asked before; its history and checkpoints stay."""
    return await submitter.remove_lora(adapter_id)


router = Router(path="/", route_handlers=[add_lora, list_adapters, show_adapter, remove_lora])
