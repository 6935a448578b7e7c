"""When the client tries again, how long it waits, and what it raises in the end."""

import httpx
import msgspec
import pytest

from tinkerbell import errors
from tinkerbell.sdk.errors import RequestFailed, Unreachable, error_of, request_failed
from tinkerbell.sdk.retry import Attempts, RetryPolicy
from tinkerbell.wire import Failure


def problem(slug: str, status: int, **extra: object) -> bytes:
    return msgspec.json.encode(
        {"type": f"urn:tinkerbell:problem:{slug}", "title": "T", "status": status, "detail": "why", **extra}
    )


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_delay_doubles_up_to_the_longest() -> None:
    policy = RetryPolicy(first_delay_s=1.0, longest_delay_s=8.0)
    assert [policy.delay_s(n, None, 0.0) for n in range(6)] == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    assert policy.delay_s(10_000, None, 0.999) < 8.0


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.999])
def test_retry_after_is_never_undercut(chance: float) -> None:
    assert 20.0 <= RetryPolicy().delay_s(0, 20.0, chance) <= 22.0


def test_status_that_says_nothing_of_the_request_is_tried_again() -> None:
    attempts = Attempts(RetryPolicy(), "GET /x", Clock())
    for status in (429, 502, 503, 504):
        assert attempts.after_answer(httpx.Response(status), b"") is not None
    assert attempts.after_answer(httpx.Response(202), b"") is None


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 500])
def test_status_about_the_request_is_final(status: int) -> None:
    with pytest.raises(errors.TinkerbellError):
        Attempts(RetryPolicy(), "GET /x", Clock()).after_answer(httpx.Response(status), b"")


def test_gives_up_with_the_last_problem() -> None:
    clock = Clock()
    attempts = Attempts(RetryPolicy(give_up_after_s=10.0), "POST /x", clock)
    content = problem("too-many-requests", 429, retry_after_s=4, place=7)
    response = httpx.Response(429, headers={"Retry-After": "4"})
    delays = 0
    with pytest.raises(errors.TooManyRequests) as caught:
        while (delay := attempts.after_answer(response, content)) is not None:
            assert delay >= 4
            clock.now += delay
            delays += 1
    assert delays == 2
    assert caught.value.extra == {"retry_after_s": 4, "place": 7}


def test_gives_up_on_silence_naming_the_call_and_the_cause() -> None:
    attempts = Attempts(RetryPolicy(give_up_after_s=0.0), "POST /v1/adapters at http://h", Clock())
    with pytest.raises(Unreachable, match=r"POST /v1/adapters at http://h.*ConnectError: refused") as caught:
        attempts.after_loss(httpx.ConnectError("refused"))
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


def test_a_mistake_in_the_request_is_not_tried_again() -> None:
    with pytest.raises(Unreachable):
        Attempts(RetryPolicy(), "GET /x", Clock()).after_loss(httpx.LocalProtocolError("bad header"))


def test_success_starts_the_count_anew() -> None:
    clock = Clock()
    attempts = Attempts(RetryPolicy(give_up_after_s=5.0, first_delay_s=1.0), "GET /v1/events", clock)
    for _ in range(20):
        clock.now += 4.0
        assert attempts.after_loss(httpx.ReadError("")) <= 1.0
        attempts.after_answer(httpx.Response(200), b"")


def test_every_problem_becomes_its_own_class() -> None:
    for cls in (
        errors.InvalidRequest,
        errors.NotFound,
        errors.IdempotencyConflict,
        errors.SequenceConflict,
        errors.TooLarge,
        errors.Unauthorized,
        errors.Unavailable,
    ):
        error = error_of(cls.status, problem(cls.slug, cls.status))
        assert type(error) is cls
        assert error.detail == "why"


def test_an_answer_in_unknown_words_keeps_its_status() -> None:
    assert type(error_of(404, b"<html>not here</html>")) is errors.UserError
    assert "not here" in str(error_of(404, b"<html>not here</html>"))
    assert type(error_of(500, problem("from-the-future", 500))) is errors.ServerError
    foreign = msgspec.json.encode({"type": "about:blank", "title": "T", "status": 404, "detail": "d"})
    assert type(error_of(404, foreign)) is errors.UserError


def test_a_failed_future_can_be_caught_by_who_can_mend_it() -> None:
    by_user = request_failed(7, Failure(category="user", code="no-gradients", message="nothing to apply"))
    by_server = request_failed(8, Failure(category="server", code="state-lost", message="gone"))
    assert isinstance(by_user, RequestFailed)
    assert isinstance(by_user, errors.UserError)
    assert not isinstance(by_user, errors.ServerError)
    assert isinstance(by_server, errors.ServerError)
    assert (by_user.category, by_server.category) == ("user", "server")
    assert (by_user.future_id, by_user.code, by_user.message) == (7, "no-gradients", "nothing to apply")
