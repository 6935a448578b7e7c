"""Whether a tenant may add one more request to its line. Pure: the numbers are arguments.

What is over a limit is refused at once, with the place it would have had and an estimate of when to come
back; nothing is ever delayed in silence. Fairness between tenants is the scheduler's, not decided here.
"""

import msgspec

from tinkerbell.errors import QuotaExceeded, TooManyRequests
from tinkerbell.events.quotas import Amounts

MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0
IDLE_RETRY_S = 10.0
"""Advice while nothing was finished lately, so that nothing can be estimated."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant has waiting, and how fast its line has moved."""

    requests: int
    tokens: int
    tokens_per_s: float = 0.0
    """Tokens of this tenant's requests finished lately; 0 where none were."""


def fits(limits: Amounts, line: Line, tokens: int) -> bool:
    """Whether a request of `tokens` tokens has room."""
    return line.requests < limits.pending_requests and line.tokens + tokens <= limits.pending_tokens


def refuse(limits: Amounts, line: Line, tokens: int) -> QuotaExceeded | TooManyRequests:
    """Why a request that does not fit is refused: never possible (413), or not now (429)."""
    if tokens > limits.pending_tokens:
        return QuotaExceeded(
            f"The request has {tokens} tokens, those to be sampled included; your limit of pending tokens is"
            f" {limits.pending_tokens}.",
            num_tokens=tokens,
            limit=limits.pending_tokens,
        )
    if line.requests >= limits.pending_requests:
        detail = f"{line.requests} requests of yours are pending; the limit is {limits.pending_requests}."
    else:
        detail = (
            f"{line.tokens} tokens of yours are pending and this request has {tokens};"
            f" the limit is {limits.pending_tokens}."
        )
    return TooManyRequests(detail, retry_after_s=retry_after_s(limits, line, tokens), place=line.requests)


def retry_after_s(limits: Amounts, line: Line, tokens: int) -> float:
    """Seconds until the line is short enough at its recent speed, within [MIN_RETRY_S, MAX_RETRY_S]."""
    if line.tokens_per_s <= 0:
        return IDLE_RETRY_S
    tokens_over = line.tokens + tokens - limits.pending_tokens
    requests_over = line.requests + 1 - limits.pending_requests
    mean_tokens = line.tokens / line.requests if line.requests else 0.0
    wait_s = max(tokens_over, requests_over * mean_tokens, 0.0) / line.tokens_per_s
    return min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S)
