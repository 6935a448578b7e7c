"""Where recovery begins, and what it executes again."""

import msgspec
import pytest

from tinkerbell.events import kinds
from tinkerbell.events.kinds import Recorded
from tinkerbell.executors.port import ForwardBackwardDone, OptimStepDone, UnitFailed
from tinkerbell.scheduler.environments import tolerance_of
from tinkerbell.scheduler.recovery import find_marks, last_marks
from tinkerbell.scheduler.results import logprobs_digest
from tinkerbell.scheduler.tail import Committed, committed_tail
from tinkerbell.types import AdamParams, LoraConfig, LossSpec

LORA = LoraConfig()
MADE = kinds.AddLoraCompleted(num_parameters=1, step=0, state_digest="d0")
STEPPED = kinds.OptimStepCompleted(step=1, grad_norm=1.0, state_digest="d1")
LOADED = kinds.LoadCompleted(checkpoint="ck", step=1, state_digest="d1")
SAVED = kinds.SaveCompleted(checkpoint="ck", name=None, step=1, lora=LORA, num_bytes=1, state_digest="d1")
WRITTEN = kinds.CheckpointWritten(checkpoint="ck", after_seq=0, step=1, lora=LORA, num_bytes=1, state_digest="d1")
TRAIN = kinds.ForwardBackwardRequested(loss=LossSpec(), num_datums=1, num_tokens=1)
TRAINED = kinds.ForwardBackwardCompleted(loss=0.0, metrics={}, num_tokens=1)
STEP = kinds.OptimStepRequested(adam=AdamParams())


def recorded(position: int, event: kinds.AnyEvent, causation: int | None = None) -> Recorded:
    return Recorded(
        position=position,
        stream="adapter/a",
        stream_version=position,
        at_us=0,
        tenant="t",
        adapter="a",
        seq=None,
        event=event,
        body=None,
        blobs={},
        causation=causation,
        correlation=None,
        actor=None,
        hash="",
    )


@pytest.mark.parametrize(
    ("events", "origin", "boundary"),
    [
        ([(MADE, 1)], MADE, 1),
        ([(MADE, 1), (STEPPED, 3)], MADE, 1),
        ([(MADE, 1), (STEPPED, 3), (WRITTEN, 3)], WRITTEN, 3),
        ([(MADE, 1), (STEPPED, 3), (SAVED, 5)], SAVED, 3),
        ([(MADE, 1), (SAVED, 5), (STEPPED, 6)], SAVED, 1),
        ([(MADE, 1), (STEPPED, 3), (SAVED, 5), (LOADED, 6)], LOADED, 6),
        # Written later than the save that came after it: what it holds counts, not when it was written.
        ([(MADE, 1), (STEPPED, 3), (SAVED, 5), (WRITTEN, 3)], SAVED, 3),
    ],
)
def test_the_newest_state_is_the_origin_and_gradients_since_the_last_step_are_not_in_it(events, origin, boundary):
    log = [recorded(100 + i, event, causation) for i, (event, causation) in enumerate(events)]
    marks = last_marks(log)
    assert marks is not None
    assert (marks.origin.event, marks.boundary) == (origin, boundary)


def test_an_adapter_that_was_never_made_has_no_marks():
    assert last_marks([]) is None


def test_only_what_had_an_effect_is_executed_again():
    failed = kinds.ForwardBackwardFailed(category="user", code="x", message="")
    bad_step = kinds.OptimStepFailed(category="user", code="non-finite", message="")
    lost_step = kinds.OptimStepFailed(category="server", code="poison", message="")
    asked = [TRAIN, TRAIN, STEP, STEP, STEP, TRAIN]
    log = [recorded(1 + i, event) for i, event in enumerate(asked)]
    answers = [TRAINED, failed, STEPPED, bad_step, lost_step]
    log += [recorded(10 + i, event, 1 + i) for i, event in enumerate(answers)]
    tail = committed_tail(log)
    assert [each.request.position for each in tail] == [1, 3, 4]
    assert [each.result for each in tail] == [TRAINED, STEPPED, bad_step]


ROWS = [b"1234", b"5678"]
PART = [ForwardBackwardDone(request=7, loss=0.0, metrics={}, logprobs=[row]) for row in ROWS]
DONE = OptimStepDone(request=7, step=3, grad_norm=1.0, state_digest="s", gradient_digest="g", weights_digest="w")
NO = UnitFailed(request=7, category="user", code="non-finite", message="")
TRAINED_WITH = msgspec.structs.replace(TRAINED, logprobs_digest=logprobs_digest(ROWS))
STEPPED_WITH = kinds.OptimStepCompleted(
    step=3, grad_norm=1.0, state_digest="s", gradient_digest="g", weights_digest="w"
)
FAILED_WITH = kinds.OptimStepFailed(category="user", code="non-finite", message="")
replace = msgspec.structs.replace


@pytest.mark.parametrize(
    ("event", "result", "found", "difference"),
    [
        (TRAIN, TRAINED, PART, None),
        (TRAIN, TRAINED_WITH, PART, None),
        (TRAIN, TRAINED_WITH, PART[::-1], f"logprobs digest {logprobs_digest(ROWS[::-1])}"),
        (TRAIN, TRAINED_WITH, PART[:1], f"logprobs digest {logprobs_digest(ROWS[:1])}"),
        (TRAIN, TRAINED_WITH, [PART[0], NO], "outcome non-finite, recorded done"),
        (STEP, STEPPED_WITH, [DONE], None),
        (STEP, replace(STEPPED_WITH, gradient_digest=None, weights_digest=None), [DONE], None),
        # The cause is named, not what follows from it.
        (STEP, STEPPED_WITH, [replace(DONE, gradient_digest="G", state_digest="S")], "gradient digest G, recorded g"),
        (STEP, STEPPED_WITH, [replace(DONE, weights_digest="W", state_digest="S")], "weights digest W, recorded w"),
        (STEP, STEPPED_WITH, [replace(DONE, state_digest="S")], "state digest of step 3 S, recorded s"),
        (STEP, STEPPED_WITH, [NO], "outcome non-finite, recorded done"),
        (STEP, FAILED_WITH, [NO], None),
        (STEP, FAILED_WITH, [DONE], "outcome done, recorded non-finite"),
    ],
)
def test_what_was_executed_again_is_compared_with_the_log(event, result, found, difference):
    said = Committed(recorded(7, event), result).difference(found)
    if difference is None:
        assert said is None
    else:
        assert said is not None and said.startswith(f"{kinds.kind_of(event)} at position 7, executed again: ")
        assert difference in said


@pytest.mark.parametrize(
    ("event", "result", "found", "deviation"),
    [
        (TRAIN, replace(TRAINED_WITH, loss=4.0003), [replace(PART[0], loss=1.0), replace(PART[1], loss=3.0)], None),
        (TRAIN, replace(TRAINED_WITH, loss=4.1), [replace(PART[0], loss=1.0), replace(PART[1], loss=3.0)], "loss 4.0,"),
        (TRAIN, TRAINED_WITH, [PART[0], NO], "outcome non-finite, recorded done"),
        (STEP, STEPPED_WITH, [replace(DONE, grad_norm=1.0005, state_digest="S")], None),
        (STEP, STEPPED_WITH, [replace(DONE, grad_norm=1.1)], "gradient norm 1.1, recorded 1.0 (allowed: 0.001)"),
        (STEP, FAILED_WITH, [NO], None),
        (STEP, FAILED_WITH, [DONE], "outcome done, recorded non-finite"),
    ],
)
def test_where_bits_are_not_promised_numbers_are_near(event, result, found, deviation):
    said = Committed(recorded(7, event), result).deviation(found, tolerance_of("float32"), step=0)
    assert said is None if deviation is None else deviation in (said or "")


class _Log:
    """Reads backwards from a list, and counts."""

    def __init__(self, events: list[Recorded]) -> None:
        self.events = events
        self.num_read = 0

    def read_back(self, *, before: int | None, limit: int, adapter: str, types: object) -> list[Recorded]:
        found = [event for event in self.events if before is None or event.position < before][-limit:][::-1]
        self.num_read += len(found)
        return found


def test_where_to_begin_is_found_from_the_end_however_long_the_run():
    events = [recorded(2, MADE, 1)]
    for step in range(3000):
        events.append(recorded(10 + 4 * step, STEPPED, 9 + 4 * step))
        if step % 500 == 0:
            # Recovery points are written some steps later than the state they hold.
            events.append(recorded(10 + 4 * step + 2, WRITTEN, 9 + 4 * max(0, step - 3)))
    log = _Log(events)
    found = find_marks(log, "a")  # type: ignore[arg-type]
    assert found == last_marks(events)
    assert log.num_read < 600
