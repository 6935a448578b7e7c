"""The OpenAPI document at /schema and a page to read it, with every file served from here."""

import errno
from typing import Any

import openapi_ui_bundles.swagger_ui
from litestar import Request, Response, Router
from litestar.datastructures import ResponseHeader
from litestar.exceptions import HTTPException, NotFoundException
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, SwaggerRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme, Tag
from litestar.static_files import create_static_files_router

import tinkerbell
from tinkerbell.api import problems
from tinkerbell.api.auth import PUBLIC
from tinkerbell.api.schemas import wire_schemas

ASSETS = "/schema/assets"

_DESCRIPTION = """\
Fine-tune many LoRA adapters at once on one frozen base model.

Every POST is an event in the log before it is answered with 202 and a future;
`GET /v1/futures/{future_id}?wait_s=30` waits for the answer. Requests of one adapter run in the order they
were accepted, so send them without waiting.
Errors are RFC 9457 problem documents; `type` is `urn:tinkerbell:problem:<slug>`.
"""

_TAGS = {
    "adapters": "Many small weight differences on one frozen model.",
    "training": "Gradients accumulate over fwdbwd calls; optim_step applies and clears them.",
    "sampling": "Continuations with per-token logprobs.",
    "checkpoints": "Weights and optimizer, in PEFT's format.",
    "futures": "What became of a request.",
    "log": "Every event of yours, in order.",
    "runs": "The history of an adapter, from its optimizer steps.",
    "usage": "What was used, and what waits.",
    "models": "What is served.",
    "aliases": "Short paths with the adapter in the body.",
    "health": "For probes; no key needed.",
}

# Nothing may come from elsewhere: the page works without a network, and says so to the browser.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
)


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """The framework's document with the exact schemas of the wire types, and no parameter that may be null.

    Changes `document`; doing it again changes nothing.
    """
    document["components"]["schemas"].update(wire_schemas())
    for item in document["paths"].values():
        for operation in item.values():
            for parameter in operation.get("parameters", ()):
                for choice in parameter["schema"].pop("oneOf", ()):
                    if choice != {"type": "null"}:
                        parameter["schema"].update(choice)
    return document


class _Page(SwaggerRenderPlugin):
    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return super().render(request, complete(openapi_schema))


class _Json(JsonRenderPlugin):
    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return super().render(request, complete(openapi_schema))


def config() -> OpenAPIConfig:
    """OpenAPI 3.1 at /schema/openapi.json, the page at /schema."""
    return OpenAPIConfig(
        title="Tinkerbell",
        version=tinkerbell.__version__,
        description=_DESCRIPTION,
        use_handler_docstrings=True,
        tags=[Tag(name=name, description=description) for name, description in _TAGS.items()],
        components=Components(
            security_schemes={
                "bearer": SecurityScheme(type="http", scheme="bearer", description="Authorization: Bearer tb-..."),
                "header": SecurityScheme(type="apiKey", name="X-API-Key", security_scheme_in="header"),
            }
        ),
        security=[{"bearer": []}, {"header": []}],
        render_plugins=[
            _Page(
                path="/",
                js_url=f"{ASSETS}/swagger-ui-bundle.js",
                css_url=f"{ASSETS}/swagger-ui.css",
                standalone_preset_js_url=f"{ASSETS}/swagger-ui-standalone-preset.js",
                favicon='<link rel="icon" href="data:,">',
            ),
            _Json(),
        ],
        openapi_router=Router(
            path="/schema",
            route_handlers=[],
            opt=PUBLIC,
            include_in_schema=False,
            response_headers=[ResponseHeader(name="Content-Security-Policy", value=_POLICY)],
        ),
    )


def assets() -> Router:
    """The page's scripts and styles, from an installed package."""
    return create_static_files_router(
        path=ASSETS,
        directories=[openapi_ui_bundles.swagger_ui.static_path],
        opt=PUBLIC,
        include_in_schema=False,
        exception_handlers={HTTPException: _answer_name},
    )


def _answer_name(request: Request[Any, Any, Any], error: HTTPException) -> Response[dict[str, Any]]:
    """A name that no file can have is that of no file."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno == errno.ENAMETOOLONG:
        error = NotFoundException()
    return problems.answer_http_error(request, error)
