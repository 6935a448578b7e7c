"""Who is waited for before the next batch, and for how long."""

from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from tinkerbell.scheduler.gathering import LEAST_S, MOST_S, SHARE, Gathering

BUSY_S = 5.0
WINDOW_S = SHARE * BUSY_S


def after_a_round(lags: dict[str, list[float]], busy_s: float = BUSY_S) -> Gathering:
    """All were served twice; in between each sent its requests so many seconds after the first batch."""
    gathering = Gathering()
    for adapter, times in lags.items():
        for _ in times:
            gathering.sent(adapter, 0.0)
    gathering.served(lags, busy_s, 10.0, more=False)
    for time, adapter in sorted((time, adapter) for adapter, times in lags.items() for time in times):
        gathering.sent(adapter, 10.0 + time)
    gathering.served(lags, busy_s, 20.0, more=False)
    return gathering


def test_the_rest_is_waited_for_until_all_their_requests_are_there():
    gathering = after_a_round({"a": [0.01, 0.02], "b": [0.02, 0.03]})
    gathering.sent("a", 20.0)
    assert gathering.wait_s(20.0) == approx(WINDOW_S)
    gathering.sent("b", 20.01)
    gathering.sent("b", 20.02)
    assert gathering.wait_s(20.02) == approx(WINDOW_S - 0.02), "the optim_step of a is missing"
    gathering.sent("a", 20.03)
    assert gathering.wait_s(20.03) == 0


def test_nobody_waits_alone_or_for_a_short_batch():
    gathering = after_a_round({"a": [0.01]})
    gathering.sent("a", 20.01)
    assert gathering.wait_s(20.01) == 0
    gathering = after_a_round({"a": [0.0], "b": [0.0]}, busy_s=LEAST_S / SHARE / 2)
    gathering.sent("a", 20.0)
    assert gathering.wait_s(20.0) == 0


def test_who_did_not_come_is_not_waited_for_again_until_it_was_prompt():
    gathering = after_a_round({"a": [0.01], "b": [1.0]})
    gathering.sent("a", 20.0)
    assert gathering.wait_s(20.0) == 0, "b was late the last time"
    # But it comes within the time, and is waited for after that.
    gathering.sent("b", 20.05)
    gathering.served(["a", "b"], BUSY_S, 30.0, more=False)
    gathering.sent("a", 30.0)
    assert gathering.wait_s(30.0) == approx(WINDOW_S)
    assert gathering.wait_s(30.0 + WINDOW_S) == 0, "the time is over"
    gathering.served(["a"], BUSY_S, 40.0, more=True)
    assert gathering.wait_s(40.0) > 0, "a is prompt"


def test_somebody_who_will_never_come_is_forgotten():
    gathering = after_a_round({"a": [0.0], "b": [0.0]})
    gathering.forget("b")
    gathering.sent("a", 20.0)
    assert gathering.wait_s(20.0) == 0


@given(
    events=st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0, 20), st.floats(0, 100)), max_size=40)
)
def test_the_wait_is_bounded_and_ends(events):
    gathering, now = Gathering(), 0.0
    for adapter, serve, pause, busy_s in events:
        now += pause
        if serve:
            gathering.served([adapter], busy_s, now, more=False)
        else:
            gathering.sent(adapter, now)
        wait = gathering.wait_s(now)
        assert 0 <= wait <= MOST_S + 1e-9
        assert gathering.wait_s(now + wait) == 0
