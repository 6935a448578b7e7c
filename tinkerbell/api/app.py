"""The application: routes, guard, problems, metrics and documentation put together, in the order a request
meets them."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from litestar import Litestar, Router
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.plugins.prometheus import PrometheusConfig

from tinkerbell.api import documentation, problems
from tinkerbell.api.auth import authenticate
from tinkerbell.api.context import Context
from tinkerbell.api.correlation import add_request_id
from tinkerbell.api.dependencies import PROVIDERS
from tinkerbell.api.heads import HeadCheck
from tinkerbell.api.requests import ApiRequest
from tinkerbell.api.routes import (
    adapters,
    aliases,
    checkpoints,
    events,
    futures,
    health,
    limits,
    runs,
    sampling,
    training,
)
from tinkerbell.api.shares import GiveBack
from tinkerbell.api.tinker import app as tinker
from tinkerbell.config import Settings
from tinkerbell.errors import TinkerbellError
from tinkerbell.events.store import EventStore

V1 = (adapters, training, sampling, checkpoints, futures, events, runs, limits)


def create_app(
    settings: Settings,
    store: EventStore,
    *,
    scheduler_failed: Callable[[], Exception | None] | None = None,
    executor_away: Callable[[], bool] | None = None,
) -> Litestar:
    """The HTTP edge over an open store, which stays the caller's to close.

    `scheduler_failed` tells why this process's scheduler ended, if it has one and it did; `executor_away` whether its
    executor has ended and is not there again yet. Raises InvalidRequest for settings that would serve without keys
    beyond loopback.
    """
    context = Context(settings, store, scheduler_failed, executor_away)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        await context.start()
        try:
            yield
        finally:
            await context.stop()
            context.threads.close()
            context.decoders.close()

    return Litestar(
        route_handlers=[
            health.router,
            documentation.assets(),
            Router(path="/v1", route_handlers=[module.router for module in V1]),
            aliases.router,
            tinker.router(),
        ],
        guards=[authenticate],
        dependencies=PROVIDERS,
        exception_handlers={
            TinkerbellError: problems.answer_tinkerbell_error,
            HTTPException: problems.answer_http_error,
            Exception: problems.answer_bug,
        },
        middleware=[
            HeadCheck(),
            GiveBack(context.shares),
            PrometheusConfig(app_name="tinkerbell", prefix="tinkerbell", group_path=True).middleware,
        ],
        before_send=[add_request_id],
        request_class=ApiRequest,
        request_max_body_size=settings.limits.max_body_bytes,
        openapi_config=documentation.config(),
        lifespan=[lifespan],
        state=State({"context": context}),
        logging_config=None,
    )
