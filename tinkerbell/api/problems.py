"""Errors as RFC 9457 problem documents, and their place in the OpenAPI document."""

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec

from tinkerbell import wire
from tinkerbell.api.correlation import correlation_of
from tinkerbell.errors import (
    InvalidRequest,
    NotFound,
    ServerError,
    TinkerbellError,
    TooLarge,
    Unauthorized,
    Unavailable,
    brief,
)

MEDIA_TYPE = "application/problem+json"

log = logging.getLogger("tinkerbell.api")

AnyRequest = Request[Any, Any, Any]

_DESCRIPTIONS = {
    400: "The request is not valid; `detail` names the field.",
    401: "An API key is needed.",
    403: "This key, or this host, may not do that.",
    404: "There is no such thing, or it belongs to another tenant.",
    409: "The request contradicts what has happened already.",
    410: "What was here was erased with its tenant, or removed because it was old.",
    413: "The request is too large.",
    415: "The body is not application/json.",
    429: "Too much is waiting already; `retry_after_s` and `place` tell for how long.",
    503: "The server is not ready for this yet.",
}


def problems(*statuses: int) -> dict[int, ResponseSpec]:
    """OpenAPI responses for these statuses, and for those every `/v1` route can give."""
    return {
        status: ResponseSpec(
            data_container=wire.Problem,
            generate_examples=False,
            description=_DESCRIPTIONS[status],
            media_type=MEDIA_TYPE,
        )
        for status in sorted({400, 401, 403, 429, *statuses})
    }


def _respond(
    status: int, slug: str, title: str, detail: str, extra: Mapping[str, Any], headers: Mapping[str, str]
) -> Response[dict[str, Any]]:
    body = {"type": f"urn:tinkerbell:problem:{slug}", "title": title, "status": status, "detail": brief(detail)}
    return Response({**extra, **body}, status_code=status, media_type=MEDIA_TYPE, headers=dict(headers))


def title_of(error: type[TinkerbellError]) -> str:
    """The first line of the class's docstring."""
    return (error.__doc__ or error.__name__).strip().splitlines()[0]


def answer_tinkerbell_error(request: AnyRequest, error: TinkerbellError) -> Response[dict[str, Any]]:
    """An expected failure: its own words. A server's failure is logged as well."""
    headers: dict[str, str] = {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if (retry_after_s := error.extra.get("retry_after_s")) is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    elif isinstance(error, Unavailable):
        headers["Retry-After"] = "1"
    if isinstance(error, ServerError):
        log.warning(
            "%s %s: %s: %s [%s]",
            request.method,
            request.scope["path"],
            error.slug,
            error.detail,
            correlation_of(request.scope),
        )
    return _respond(error.status, error.slug, title_of(type(error)), error.detail, error.extra, headers)


def answer_http_error(request: AnyRequest, error: HTTPException) -> Response[dict[str, Any]]:
    """What the framework itself refused: no such route, a parameter out of range, a body over the limit."""
    if error.status_code >= 500:
        return answer_bug(request, error)
    headers = error.headers or {}
    if error.status_code == 404:
        return _respond(404, NotFound.slug, title_of(NotFound), f"{request.scope['path']} is no route", {}, headers)
    if error.status_code == 413:
        return _respond(413, TooLarge.slug, title_of(TooLarge), _too_large(request), {}, headers)
    if error.status_code == 400:
        return _respond(400, InvalidRequest.slug, title_of(InvalidRequest), _validation(error), {}, headers)
    phrase = HTTPStatus(error.status_code).phrase
    return _respond(error.status_code, phrase.lower().replace(" ", "-"), f"{phrase}.", error.detail, {}, headers)


def answer_bug(request: AnyRequest, error: Exception) -> Response[dict[str, Any]]:
    """Anything unforeseen: the traceback goes to the log, the caller gets the id to look for."""
    correlation = correlation_of(request.scope)
    log.error("%s %s failed [%s]", request.method, request.scope["path"], correlation, exc_info=error)
    detail = f"An unexpected error; the server's log has it under request id {correlation}."
    return _respond(500, ServerError.slug, title_of(ServerError), detail, {}, {})


def _too_large(request: AnyRequest) -> str:
    limit = request.route_handler.resolve_request_max_body_size()
    return f"The body may have at most {limit} bytes."


def _validation(error: HTTPException) -> str:
    parts = []
    for item in error.extra if isinstance(error.extra, list) else []:
        source = getattr(item.get("source"), "value", item.get("source"))
        if source == "body":
            # What is in a body is checked in requests.py; all that is left is that there is none.
            parts.append("the body is empty; send a JSON object")
        else:
            parts.append(f"{source or 'parameter'} {item.get('key', '')}: {item.get('message', '')}")
    return "; ".join(parts) or error.detail
