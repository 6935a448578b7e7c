"""Whether the server lives, whether it is ready, and its metrics: no key needed, nothing of any tenant
told."""

from litestar import Response, Router, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.plugins.prometheus import PrometheusController

import tinkerbell
from tinkerbell import wire
from tinkerbell.api.auth import PUBLIC
from tinkerbell.api.context import Context
from tinkerbell.errors import Unavailable
from tinkerbell.events.leases import SCHEDULER
from tinkerbell.types import SYSTEM_TENANT


def _unavailable(container: type[wire.Health] | type[wire.Readiness], description: str) -> dict[int, ResponseSpec]:
    return {503: ResponseSpec(data_container=container, generate_examples=False, description=description)}


@get(
    "/healthz",
    operation_id="healthz",
    summary="Does it live",
    tags=["health"],
    opt=PUBLIC,
    security=[{}],
    sync_to_thread=False,
    responses=_unavailable(wire.Health, "The scheduler or the event store has ended; restart the server."),
)
def healthz(context: NamedDependency[Context]) -> Response[wire.Health]:
    """Also names the durability of what is acknowledged."""
    failed = context.failure() is not None
    health = wire.Health(
        status="failed" if failed else "ok",
        durability=context.settings.durability,
        version=tinkerbell.__version__,
    )
    return Response(health, status_code=503 if failed else 200)


@get(
    "/readyz",
    operation_id="readyz",
    summary="Is it ready for work",
    tags=["health"],
    opt=PUBLIC,
    security=[{}],
    responses=_unavailable(wire.Readiness, "Not yet, or not any more; `reason` tells."),
)
async def readyz(context: NamedDependency[Context]) -> Response[wire.Readiness]:
    """Ready once an executor has come up and until the server stops, but for while no scheduler leads, in this process
    or another, or an executor that died or hung is replaced: what is asked then waits. Where roles run apart, the
    executor's end is known to the scheduler's process only."""
    reason = await context.read(SYSTEM_TENANT, _not_ready, context)
    return Response(wire.Readiness(ready=not reason, reason=reason), status_code=503 if reason else 200)


def _not_ready(context: Context) -> str:
    if context.stopping.is_set():
        return "The server is stopping."
    if context.failure() is not None:
        return "The scheduler or the event store has ended."
    if context.executor_away():
        return "The executor has ended; it is being started again."
    try:
        context.model()
        led = context.store.is_held(SCHEDULER)
    except Unavailable as error:
        return error.detail
    return "" if led else "No scheduler answers requests now; they are taken, and wait for one."


class Metrics(PrometheusController):
    """GET /metrics in the Prometheus text format."""

    opt = PUBLIC
    include_in_schema = False


router = Router(path="/", route_handlers=[healthz, readyz, Metrics])
