"""The tinker protocol as one router."""

from litestar import Router
from litestar.exceptions import HTTPException

from tinkerbell.api.tinker import problems
from tinkerbell.api.tinker.dependencies import PROVIDERS
from tinkerbell.api.tinker.routes import accounts, checkpoints, futures, runs, sampling, service, training
from tinkerbell.errors import TinkerbellError

MODULES = (service, training, sampling, futures, runs, checkpoints, accounts)


def router() -> Router:
    """`/api/v1`. No part of the OpenAPI document: its clients are not written by hand."""
    return Router(
        path="/api/v1",
        route_handlers=[module.router for module in MODULES],
        dependencies=PROVIDERS,
        exception_handlers={
            TinkerbellError: problems.answer_tinkerbell_error,
            HTTPException: problems.answer_http_error,
            Exception: problems.answer_bug,
        },
        include_in_schema=False,
    )
