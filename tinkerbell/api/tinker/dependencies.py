"""What the handlers of the tinker protocol are given."""

from collections.abc import Callable

from litestar.di import NamedDependency, Provide

from tinkerbell.api.context import Context
from tinkerbell.api.correlation import correlation_of
from tinkerbell.api.requests import ApiRequest
from tinkerbell.api.submitting import Caller
from tinkerbell.api.tinker.submitter import TinkerSubmitter

Submit = Callable[[str | None], TinkerSubmitter]
"""A submitter for the caller of this request; by this key its retry is known."""


async def provide_submit(request: ApiRequest, context: NamedDependency[Context]) -> Submit:
    """Reads the body: its bytes say whether a request is the same again."""
    raw = await request.body()

    def submit(key: str | None) -> TinkerSubmitter:
        caller = Caller(
            principal=request.user,
            correlation=correlation_of(request.scope),
            idempotency_key=key if key is None else f"tinker:{key}",
            raw=raw,
        )
        return TinkerSubmitter(context, caller)

    return submit


PROVIDERS = {"submit": Provide(provide_submit)}
