"""Runs, usage, the queue and the model: what happened, what it cost, what waits, what is served."""

import time
from pathlib import Path
from typing import Annotated

import msgspec
from litestar import Router, get
from litestar.di import NamedDependency
from litestar.params import FromPath, QueryParameter

from tinkerbell import wire
from tinkerbell.api import validation, views
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.paging import MAX_POSITION, AfterId, Limit, Offset
from tinkerbell.api.problems import problems
from tinkerbell.api.routes.adapters import page_of_adapters
from tinkerbell.errors import Forbidden, InvalidRequest
from tinkerbell.events.rows import AdapterRow, RunCounts
from tinkerbell.types import ModelInfo, TenantId

RECENT_S = 60.0
"""Window of the queue's `recent` numbers."""

AfterStep = Annotated[int, QueryParameter(ge=0, le=MAX_POSITION, description="Only points of later steps.")]
AfterUsage = Annotated[
    str | None,
    QueryParameter(
        name="after",
        description="`tenant/adapter/kind` of the last row of the page before; the base model's adapter is empty.",
    ),
]
AllTenants = Annotated[bool, QueryParameter(description="Every tenant's; needs an admin key.")]


def _run(row: AdapterRow, counts: RunCounts, points: list[wire.RunPoint]) -> wire.Run:
    return wire.Run(
        adapter=views.adapter(row),
        num_requests=counts.num_requests,
        num_failed=counts.num_failed,
        num_tokens=counts.num_tokens,
        cost_us=counts.cost_us,
        points=points,
    )


@get("/runs", operation_id="list_runs", summary="Your runs", tags=["runs"], responses=problems(404))
async def list_runs(
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    limit: Limit = 100,
    offset: Offset = 0,
    after: AfterId = None,
) -> list[wire.Run]:
    """One for each adapter, oldest first, without points."""

    def read() -> list[wire.Run]:
        rows = page_of_adapters(context, principal.tenant, after, offset, limit)
        counts = context.store.queries.run_counts(principal.tenant, [row.id for row in rows])
        return [_run(row, counts[row.id], []) for row in rows]

    return await context.read(principal.tenant, read)


@get("/runs/{adapter_id:str}", operation_id="show_run", summary="A run", tags=["runs"], responses=problems(404))
async def show_run(
    adapter_id: FromPath[str],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    after_step: AfterStep = 0,
    limit: Limit = 1000,
) -> wire.Run:
    """The history of an adapter: one point for each optimizer step, straight from the log."""

    def read() -> wire.Run:
        queries = context.store.queries
        row = queries.adapter(principal.tenant, validation.adapter_id(adapter_id))
        if row is None:
            raise validation.no_adapter(adapter_id)
        points = queries.run_points(principal.tenant, adapter_id, after_step, limit)
        counts = queries.run_counts(principal.tenant, [row.id])[row.id]
        return _run(row, counts, [views.run_point(point) for point in points])

    return await context.read(principal.tenant, read)


@get("/usage", operation_id="show_usage", summary="What was used", tags=["usage"], responses=problems())
async def show_usage(
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    all_tenants: AllTenants = False,
    limit: Limit = 1000,
    after: AfterUsage = None,
) -> list[wire.UsageRow]:
    """By adapter and kind of request: tokens, and accelerator microseconds, which sum to the time it was
    busy."""
    last = None if after is None else _usage_key(after)
    tenant = _scope(principal, all_tenants)
    rows = await context.read(principal.tenant, context.store.queries.usage, tenant, after=last, limit=limit)
    return [views.usage_row(row) for row in rows]


@get("/queue", operation_id="show_queue", summary="What waits", tags=["usage"], responses=problems())
async def show_queue(
    context: NamedDependency[Context], principal: NamedDependency[Principal], all_tenants: AllTenants = False
) -> wire.Queue:
    """Your own line."""
    tenant = _scope(principal, all_tenants)
    return await context.read(principal.tenant, _queue, context, tenant)


@get("/models", operation_id="list_models", summary="What is served", tags=["models"], responses=problems(503))
async def list_models(context: NamedDependency[Context], principal: NamedDependency[Principal]) -> list[ModelInfo]:
    """The base model: vocabulary, longest sequence, LoRA targets, tokenizer. A tokenizer in a directory of the server
    is named only where callers are on its machine."""
    model = await context.read(principal.tenant, context.model)
    if not context.gate.loopback and Path(model.tokenizer).is_absolute():
        model = msgspec.structs.replace(model, tokenizer="")
    return [model]


def _usage_key(text: str) -> tuple[str, str, str]:
    match text.split("/"):
        case [tenant, adapter, kind]:
            return tenant, adapter, kind
        case _:
            raise InvalidRequest(f"after: {text[:100]!r} is not tenant/adapter/kind of the last row, as it was given.")


def _scope(principal: Principal, all_tenants: bool) -> TenantId | None:
    if not all_tenants:
        return principal.tenant
    if not principal.admin:
        raise Forbidden("all_tenants needs an admin key.")
    return None


def _queue(context: Context, tenant: TenantId | None) -> wire.Queue:
    queries = context.store.queries
    names = queries.tenants() if tenant is None else [tenant]
    recent = queries.recent_usage(time.time_ns() // 1000 - int(RECENT_S * 1e6), names)
    served = queries.served_us(tenant)
    lines = []
    for name in names:
        num_pending, pending_tokens = queries.pending_count(name)
        recent_cost_us, recent_tokens = recent.get(name, (0, 0))
        lines.append(
            wire.TenantQueue(
                tenant=name,
                weight=queries.tenant(name).weight,
                num_pending=num_pending,
                pending_tokens=pending_tokens,
                cost_us=served.get(name, 0),
                recent_cost_us=recent_cost_us,
                recent_tokens=recent_tokens,
            )
        )
    return wire.Queue(tenants=lines, position=context.store.head())


router = Router(path="/", route_handlers=[list_runs, show_run, show_usage, show_queue, list_models])
