"""Reading bodies: no more than the route takes, as the declared type and nothing else, whatever bytes arrive."""

import logging
from typing import Any

from litestar import Request
from litestar.datastructures import State
from litestar.exceptions import ClientException, HTTPException
from litestar.types import Empty, HTTPReceiveMessage

from tinkerbell.api import bodies
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.decoders import Job
from tinkerbell.errors import TooLarge

CARRIES_DATA: dict[str, Any] = {"carries_data": True}
"""`opt` of a route whose body carries data, but is not JSON."""

log = logging.getLogger("tinkerbell.api")


class ApiRequest(Request[Principal, Any, State]):
    """Decodes the body straight into the handler's type.

    The framework's own way decodes to dicts and then converts leniently ("5" for 5); for token lists that is
    also twice the work.
    """

    asked_hash: bytes | None = None
    """`bodies.request_hash` of a body that was decoded elsewhere, if it has an idempotency key."""

    @property
    def context(self) -> Context:
        """The app's."""
        context: Context = self.app.state.context
        return context

    @property
    def max_body_bytes(self) -> int:
        """Of this route: the server's limit where the body carries data, otherwise what names and settings need."""
        field = self.route_handler.parsed_data_field
        carries_data = field is not None and field.annotation in bodies.KINDS
        limit = self.context.settings.limits.max_body_bytes
        if carries_data or self.route_handler.opt.get("carries_data"):
            return limit
        return min(limit, bodies.SMALL_BYTES)

    async def body(self) -> bytes:
        """All of it. Raises TooLarge before it is read where its length is known, TooManyRequests, Unavailable."""
        if self._body is Empty:
            known = self._connection_state.body
            self._body = self._connection_state.body = await self._read() if known is Empty else known
        raw: bytes = self._body
        return raw

    async def _read(self) -> bytes:
        limit, shares = self.max_body_bytes, self.context.shares
        self._refuse_over(limit, self.content_length or 0)
        shares.hold_bytes(self.scope, self.content_length or 0)
        pieces: list[bytes] = []
        num_bytes = 0
        while True:
            event: HTTPReceiveMessage = await self.receive()  # type: ignore[assignment]
            if event["type"] == "http.disconnect":
                raise broken_off(self)
            num_bytes += len(event["body"])
            self._refuse_over(limit, num_bytes)
            shares.hold_bytes(self.scope, num_bytes)
            pieces.append(event["body"])
            if not event.get("more_body", False):
                return b"".join(pieces)

    def _refuse_over(self, limit: int, num_bytes: int) -> None:
        if num_bytes > limit:
            raise TooLarge(f"The body may have at most {limit} bytes.", limit=limit)

    async def json(self) -> Any:
        """The body as the type of the handler's `data`. Raises InvalidRequest, TooLarge, or 415 for another content
        type; of long ones what `Decoders.decode` raises."""
        media_type = self.content_type[0]
        if media_type != "application/json":
            # Also what keeps other web pages out in local mode: a browser sends no JSON across sites unasked.
            raise HTTPException(
                status_code=415, detail=f"Send the body as application/json, not {media_type or 'untyped'}."
            )
        field = self.route_handler.parsed_data_field
        assert field is not None, "only handlers with a body read one"
        raw, max_elements = await self.body(), self.context.settings.limits.max_body_elements
        if len(raw) <= bodies.SMALL_BYTES:
            return bodies.decode(raw, field.annotation, max_elements)
        job = Job(
            target=field.annotation.__name__,
            max_elements=max_elements,
            max_tokens=self.context.settings.limits.max_request_tokens,
            path_id=self.path_params.get("adapter_id"),
            keyed="idempotency-key" in self.headers,
        )
        decoded = await self.context.decoders.decode(self.user.tenant, job, raw)
        self.asked_hash = decoded.hashed
        return decoded.body


def broken_off(request: Request[Any, Any, Any]) -> ClientException:
    """What to raise where the client is gone: nobody reads the answer."""
    log.info("%s %s: the client broke off", request.method, request.scope["path"])
    return ClientException("The client broke off.")
