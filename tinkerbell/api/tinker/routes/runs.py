"""Training runs and sessions: what is there."""

from typing import Any

from litestar import Router, get, post, put
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.paging import Limit, Offset
from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker import session_search
from tinkerbell.api.tinker.base import check_project
from tinkerbell.api.tinker.catalog import Catalog, ask
from tinkerbell.api.tinker.dependencies import Submit


@get("/training_runs")
async def list_runs(
    context: NamedDependency[Context], principal: NamedDependency[Principal], limit: Limit = 20, offset: Offset = 0
) -> dict[str, Any]:
    """Newest first."""

    def read(catalog: Catalog) -> dict[str, Any]:
        return {
            "training_runs": catalog.runs(offset, limit),
            "cursor": {"offset": offset, "limit": limit, "total_count": catalog.num_runs()},
        }

    return await ask(context, principal, read)


@get("/training_runs/{run_id:str}")
async def show_run(
    run_id: FromPath[str], context: NamedDependency[Context], principal: NamedDependency[Principal]
) -> dict[str, Any]:
    """One of them."""
    return await ask(context, principal, lambda catalog: catalog.run(run_id))


@get("/sessions")
async def list_sessions(
    context: NamedDependency[Context], principal: NamedDependency[Principal], limit: Limit = 20, offset: Offset = 0
) -> dict[str, Any]:
    """Newest first."""
    ask_for = context.store.queries.sessions
    rows = await context.read(principal.tenant, ask_for, principal.tenant, offset=offset, limit=limit)
    return {"sessions": [row.id for row in rows]}


@post("/sessions/search", status_code=200)
async def search_sessions(
    data: JSONBody[m.SearchSessions], context: NamedDependency[Context], principal: NamedDependency[Principal]
) -> dict[str, Any]:
    """Newest first."""
    return await context.read(principal.tenant, session_search.search, context.store, principal.tenant, data)


@get("/sessions/{session_id:str}")
async def show_session(
    session_id: FromPath[str],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    submit: NamedDependency[Submit],
) -> dict[str, Any]:
    """What was made within it."""

    def read(catalog: Catalog) -> dict[str, Any]:
        row = submit(None).session(session_id)
        samplers = context.store.queries.samplers(principal.tenant, row.id)
        return {
            "training_run_ids": context.store.queries.models_of(principal.tenant, row.id),
            "sampler_ids": [each.id for each in samplers],
            "user_metadata": row.user_metadata or None,
            "display_name": row.display_name,
        }

    return await ask(context, principal, read)


@put("/sessions/{session_id:str}/project", status_code=204)
async def assign_project(
    session_id: FromPath[str],
    data: JSONBody[m.AssignProject],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    submit: NamedDependency[Submit],
) -> None:
    """A tenant is one project, and every session of it lies there."""
    await context.read(principal.tenant, submit(None).session, session_id)
    check_project(data.project_id, principal.tenant)


@get("/sessions/{session_id:str}/trace_export")
async def export_trace(
    session_id: FromPath[str],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    submit: NamedDependency[Submit],
) -> dict[str, str]:
    """No trace is made: says where the same is found."""
    await context.read(principal.tenant, submit(None).session, session_id)
    return {
        "status": "failed",
        "error": "This server makes no Perfetto traces. When each request came, ran and was answered is in its log:"
        " GET /v1/events, or SQL (docs/how-to/inspect-with-sql.md).",
    }


router = Router(
    path="/",
    route_handlers=[
        list_runs,
        show_run,
        list_sessions,
        search_sessions,
        show_session,
        assign_project,
        export_trace,
    ],
)
