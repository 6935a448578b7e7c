"""What handlers are given besides their own parameters."""

from typing import Annotated

from litestar.datastructures import State
from litestar.di import NamedDependency, Provide
from litestar.params import HeaderParameter

from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.correlation import correlation_of
from tinkerbell.api.requests import ApiRequest
from tinkerbell.api.submissions import Submitter
from tinkerbell.api.submitting import Caller
from tinkerbell.errors import InvalidRequest

IdempotencyKey = Annotated[
    str | None,
    HeaderParameter(
        name="Idempotency-Key",
        min_length=1,
        max_length=200,
        pattern=r"^[\x20-\x7e]+$",
        description="Send it again with a request whose answer was lost: the same key and request give the"
        " same future, the same key with another request gives 409. It may not begin with `tinker:`.",
    ),
]


TINKER_KEYS = "tinker:"
"""How keys of the tinker protocol begin."""


def provide_context(state: State) -> Context:
    """The app's context."""
    context: Context = state.context
    return context


def provide_principal(request: ApiRequest) -> Principal:
    """Who asks; the guard has found out."""
    return request.user


async def provide_submitter(
    request: ApiRequest, context: NamedDependency[Context], idempotency_key: IdempotencyKey = None
) -> Submitter:
    """Submits for the caller of this request."""
    if idempotency_key is not None and idempotency_key.startswith(TINKER_KEYS):
        raise InvalidRequest(
            f"Idempotency-Key: what begins with {TINKER_KEYS} names requests of the tinker protocol; choose another."
        )
    caller = Caller(
        principal=request.user,
        correlation=correlation_of(request.scope),
        idempotency_key=idempotency_key,
        raw=await request.body(),
        hashed=request.asked_hash,
    )
    return Submitter(context, caller)


PROVIDERS = {
    "context": Provide(provide_context, sync_to_thread=False),
    "principal": Provide(provide_principal, sync_to_thread=False),
    "submitter": Provide(provide_submitter),
}
