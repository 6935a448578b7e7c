"""Who may add to the line, and what is said to whom who may not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinkerbell.api import admission
from tinkerbell.api.admission import Line
from tinkerbell.config import Limits
from tinkerbell.errors import QuotaExceeded, TooManyRequests
from tinkerbell.events.quotas import NAMES, Amounts, limits_of

LIMITS = Amounts(pending_requests=10, pending_tokens=1000)


@pytest.mark.parametrize(
    ("line", "tokens", "fits"),
    [
        (Line(requests=0, tokens=0), 1000, True),
        (Line(requests=0, tokens=1), 1000, False),
        (Line(requests=9, tokens=0), 0, True),
        (Line(requests=10, tokens=0), 0, False),
    ],
)
def test_a_limit_may_be_reached_and_not_passed(line: Line, tokens: int, fits: bool) -> None:
    assert admission.fits(LIMITS, line, tokens) is fits


def test_a_tenants_own_limits_win() -> None:
    limits = limits_of(Limits(max_adapters=5), {**dict.fromkeys(NAMES), "pending_requests": 0})
    assert (limits.pending_requests, limits.adapters) == (0, 5)
    assert limits.pending_tokens == Limits().max_pending_tokens


def test_refusals_say_the_numbers() -> None:
    full = admission.refuse(LIMITS, Line(requests=10, tokens=500, tokens_per_s=25.0), 1)
    assert isinstance(full, TooManyRequests)
    assert "10 requests of yours are pending; the limit is 10" in full.detail
    # One request too many, of 50 tokens on average, at 25 tokens a second.
    assert full.extra == {"retry_after_s": 2.0, "place": 10}
    tokens = admission.refuse(LIMITS, Line(requests=1, tokens=900, tokens_per_s=10.0), 150)
    assert "900 tokens of yours are pending and this request has 150; the limit is 1000" in tokens.detail
    assert tokens.extra == {"retry_after_s": 5.0, "place": 1}


def test_what_can_never_fit_is_not_put_off() -> None:
    assert isinstance(admission.refuse(LIMITS, Line(requests=0, tokens=0), 1001), QuotaExceeded)


def test_without_a_measured_speed_nothing_is_estimated() -> None:
    assert admission.retry_after_s(LIMITS, Line(requests=10, tokens=10), 1) == admission.IDLE_RETRY_S


@given(
    st.integers(0, 10**6),
    st.integers(0, 10**9),
    st.integers(0, 10**6),
    st.floats(0, 1e9, allow_subnormal=True),
)
def test_advice_is_always_a_sane_number_of_seconds(requests: int, tokens: int, more: int, speed: float) -> None:
    line = Line(requests=requests, tokens=tokens, tokens_per_s=speed)
    assert admission.MIN_RETRY_S <= admission.retry_after_s(LIMITS, line, more) <= admission.MAX_RETRY_S
