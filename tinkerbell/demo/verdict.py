"""Whether a user's run shows what it is meant to show."""

from statistics import fmean

import msgspec

from tinkerbell.demo.track import Track

LOSS_FACTOR = 0.75
"""A loss has fallen if its last part is below this share of its first."""
REWARD_RISE = 0.1
"""A reward (0 to 1) has risen if its last part is this much above its first."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One user's start and end."""

    user: str
    measure: str
    first: float | None
    """Mean of the first fifth of the steps; None where there were none."""
    last: float | None
    """Mean of the last fifth."""
    passed: bool
    text: str


def judge(track: Track, *, toy: bool = False) -> Verdict:
    """Compare the first fifth of a run with its last.

    A toy model knows no language: of its runs only that they came to their end is asked.
    """
    values = [point.value for point in track.points]
    part = max(1, len(values) // 5)
    first = fmean(values[:part]) if values else None
    last = fmean(values[-part:]) if values else None
    if track.error or first is None or last is None:
        passed, text = False, track.error or "it took no step"
    elif toy:
        passed = len(values) == track.num_steps
        text = f"{len(values)} of {track.num_steps} steps of a toy model, whose {track.measure} shows nothing"
    elif len(values) < 2:
        passed, text = False, "one step has no direction"
    elif track.measure == "loss":
        passed = last < LOSS_FACTOR * first
        text = f"loss per token {first:.2f} -> {last:.2f}"
        text += "" if passed else f": it did not fall below {LOSS_FACTOR:.0%} of its start"
    else:
        passed = last > first + REWARD_RISE
        text = f"reward {first:.2f} -> {last:.2f}"
        text += "" if passed else f": it did not rise by {REWARD_RISE}"
    return Verdict(user=track.user, measure=track.measure, first=first, last=last, passed=passed, text=text)
