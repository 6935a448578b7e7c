"""Errors as the SDK reads them: `{"detail": ...}` with a status that it treats rightly.

It repeats what is answered with 409, and a 400 without a body; so neither is ever said of what will not change.
"""

import math
from typing import Any

from litestar import Request, Response
from litestar.exceptions import HTTPException

from tinkerbell.api import problems
from tinkerbell.errors import TinkerbellError

AnyRequest = Request[Any, Any, Any]


def answer_tinkerbell_error(request: AnyRequest, error: TinkerbellError) -> Response[dict[str, Any]]:
    """An expected failure."""
    told = problems.answer_tinkerbell_error(request, error)
    status = 400 if error.status == 409 else error.status
    headers = dict(told.headers or {})
    if (retry_after_s := error.extra.get("retry_after_s")) is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    return Response({"detail": told.content["detail"]}, status_code=status, headers=headers)


def answer_http_error(request: AnyRequest, error: HTTPException) -> Response[dict[str, Any]]:
    """What the framework itself refused."""
    told = problems.answer_http_error(request, error)
    return Response({"detail": told.content["detail"]}, status_code=told.status_code)


def answer_bug(request: AnyRequest, error: Exception) -> Response[dict[str, Any]]:
    """Anything unforeseen."""
    told = problems.answer_bug(request, error)
    return Response({"detail": told.content["detail"]}, status_code=told.status_code)
