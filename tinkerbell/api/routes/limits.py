"""What a tenant has of everything that is limited, and what it may have."""

from litestar import Router, get
from litestar.di import NamedDependency

from tinkerbell import wire
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.problems import problems
from tinkerbell.events.quotas import NAMES


@get("/limits", operation_id="show_limits", summary="What you may have", tags=["usage"], responses=problems())
async def show_limits(context: NamedDependency[Context], principal: NamedDependency[Principal]) -> wire.Quotas:
    """Used, and the limit, of requests and tokens that wait, adapters, sessions, samplers, checkpoints and stored
    bytes. Both protocols count together."""
    tenant, queries = principal.tenant, context.store.queries
    holding = await context.read(tenant, queries.holding, tenant, context.settings.limits)
    quotas = {name: wire.Quota(used=getattr(holding.used, name), limit=getattr(holding.limits, name)) for name in NAMES}
    return wire.Quotas(tenant=tenant, quotas=quotas)


router = Router(path="/", route_handlers=[show_limits])
