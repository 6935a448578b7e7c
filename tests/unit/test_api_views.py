"""Answers made of rows and events: exact, or an error, never filled in."""

import math

import msgspec
import numpy as np
import pytest

from tinkerbell import wire
from tinkerbell.api import views
from tinkerbell.errors import Corrupt
from tinkerbell.events import kinds
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.rows import FutureRow, RunPoint
from tinkerbell.types import DatumOutputs, PromptScores, SampledSequence

ROW = FutureRow(
    id=3,
    tenant="t",
    adapter="a",
    seq=1,
    kind="forward_backward",
    state="completed",
    num_tokens=2,
    result_position=4,
    cost_us=9,
    created_us=1_700_000_000_000_001,
    done_us=1_700_000_001_000_000,
)


def tokens(*ids: int) -> bytes:
    return np.array(ids, "<i4").tobytes()


def recorded(event: kinds.AnyEvent) -> Recorded:
    return Recorded(
        position=4,
        stream="adapter/a",
        stream_version=0,
        at_us=0,
        tenant="t",
        adapter="a",
        seq=None,
        event=event,
        body=None,
        blobs={},
        causation=3,
        correlation=None,
        actor=None,
        hash="",
    )


def logprobs(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


DONE = kinds.ForwardBackwardCompleted(loss=1.0, metrics={}, num_tokens=2)


def test_float32_numbers_arrive_as_they_are() -> None:
    values = (-0.1, -1e-38)
    future = views.answered(ROW, recorded(DONE), kinds.LogprobsBody([logprobs(*values)]))
    assert isinstance(future.result, wire.ForwardBackwardResult)
    sent = msgspec.json.decode(msgspec.json.encode(future), type=wire.Future)
    assert isinstance(sent.result, wire.ForwardBackwardResult)
    assert np.array(sent.result.logprobs[0], "<f4").tobytes() == logprobs(*values)


def test_times_are_rfc_3339() -> None:
    future = views.future(ROW, place=None)
    assert future.created_at == "2023-11-14T22:13:20.000001Z"
    assert future.finished_at == "2023-11-14T22:13:21.000000Z"


@pytest.mark.parametrize("body", [None, kinds.LogprobsBody([logprobs(-1.0)]), kinds.LogprobsBody([])])
def test_a_missing_logprob_is_an_error(body: kinds.Body | None) -> None:
    with pytest.raises(Corrupt, match="event 4 has"):
        views.answered(ROW, recorded(DONE), body)


FORWARD = kinds.ForwardCompleted(loss=1.0, metrics={}, num_tokens=2)


def test_outputs_arrive_as_they_are() -> None:
    logits = np.arange(6, dtype="<f4")
    datum = DatumOutputs(
        entropy=logprobs(0.5, 0.25),
        top_tokens=np.array([7, 1, 0, 2], "<i4").tobytes(),
        top_logprobs=logprobs(-0.1, -0.2, -0.3, -1e-38),
        logits=logits.tobytes(),
    )
    body = kinds.OutputsBody([logprobs(-1.0, -2.0)], [datum])
    future = views.answered(ROW, recorded(FORWARD), body)
    sent = msgspec.json.decode(msgspec.json.encode(future), type=wire.Future)
    assert isinstance(sent.result, wire.ForwardBackwardResult) and sent.result.outputs is not None
    (outputs,) = sent.result.outputs
    assert (outputs.entropy, outputs.logsumexp) == ([0.5, 0.25], None)
    assert outputs.top_tokens == [[7, 1], [0, 2]]
    assert np.array(outputs.top_logprobs, "<f4").tobytes() == datum.top_logprobs
    assert outputs.logits is not None and outputs.logits.shape == (2, 3)
    rows = outputs.logits.rows()
    assert rows.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] and rows[1, 2] == 5.0
    assert np.array_equal(np.asarray(rows), logits.reshape(2, 3))


def test_without_outputs_there_are_none() -> None:
    future = views.answered(ROW, recorded(FORWARD), kinds.OutputsBody([logprobs(-1.0, -2.0)]))
    assert isinstance(future.result, wire.ForwardBackwardResult) and future.result.outputs is None


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([DatumOutputs(), DatumOutputs()], "outputs of 2 data for 1"),
        ([DatumOutputs(entropy=logprobs(1.0))], "1 numbers of an output for 2 tokens"),
        ([DatumOutputs(entropy=logprobs(1.0, 2.0, 3.0, 4.0))], "4 numbers of an output for 2 tokens"),
        ([DatumOutputs(logits=logprobs(1.0, 2.0, 3.0))], "3 numbers of an output for 2 tokens"),
        ([DatumOutputs(top_tokens=bytes(16), top_logprobs=bytes(8))], "2 tokens and 1 logprobs"),
    ],
)
def test_outputs_of_another_length_are_an_error(outputs: list[DatumOutputs], message: str) -> None:
    with pytest.raises(Corrupt, match=message):
        views.answered(ROW, recorded(FORWARD), kinds.OutputsBody([logprobs(-1.0, -2.0)], outputs))


def test_a_sample_has_a_logprob_for_each_token() -> None:
    event = kinds.SampleCompleted(step=0, num_prompt_tokens=1, num_sampled_tokens=2)
    body = kinds.SamplesBody([SampledSequence(tokens(1, 2), logprobs(-1.0), "stop")], None)
    with pytest.raises(Corrupt, match="2 sampled tokens and 1 logprobs"):
        views.answered(ROW, recorded(event), body)
    with pytest.raises(Corrupt, match="no samples"):
        views.answered(ROW, recorded(event), None)


def test_distributions_of_a_sample_arrive_as_they_are() -> None:
    event = kinds.SampleCompleted(step=0, num_prompt_tokens=2, num_sampled_tokens=1)
    sequence = SampledSequence(tokens(9), logprobs(-1.0), "stop", tokens(9, 3), logprobs(-1.0, -2.0))
    scores = PromptScores(
        top_tokens=tokens(7, 8),
        top_logprobs=logprobs(-0.1, -0.2),
        target_logprobs=logprobs(math.nan, math.nan, -1e-38, math.nan),
    )
    future = views.answered(ROW, recorded(event), kinds.SamplesBody([sequence], None, scores))
    sent = msgspec.json.decode(msgspec.json.encode(future), type=wire.Future)
    assert isinstance(sent.result, wire.SampleResult)
    assert (sent.result.sequences[0].top_tokens, sent.result.sequences[0].top_logprobs) == ([[9, 3]], [[-1.0, -2.0]])
    assert (sent.result.prompt_logprobs, sent.result.prompt_top_tokens) == (None, [[7, 8]])
    assert np.array(sent.result.prompt_top_logprobs, "<f4").tobytes() == scores.top_logprobs
    unknown, (known, gap) = sent.result.prompt_target_logprobs or ()
    assert (unknown, gap) == ([None, None], None)
    assert np.float32(known) == np.float32(-1e-38)


def test_a_prompt_of_one_token_has_no_likeliest_ones() -> None:
    event = kinds.SampleCompleted(step=0, num_prompt_tokens=1, num_sampled_tokens=0)
    scores = PromptScores(top_tokens=b"", top_logprobs=b"", target_logprobs=logprobs(math.nan))
    result = views.answered(ROW, recorded(event), kinds.SamplesBody([], None, scores)).result
    assert isinstance(result, wire.SampleResult)
    assert (result.prompt_top_tokens, result.prompt_top_logprobs) == ([], [])
    assert result.prompt_target_logprobs == [[None]]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (PromptScores(target_logprobs=logprobs(math.nan)), "1 numbers of an output for 2 tokens"),
        (PromptScores(target_logprobs=b""), "0 numbers of an output for 2 tokens"),
        (PromptScores(top_tokens=tokens(1, 2), top_logprobs=logprobs(-1.0)), "likeliest 2 tokens and 1 logprobs"),
    ],
)
def test_distributions_of_another_length_are_an_error(scores: PromptScores, message: str) -> None:
    event = kinds.SampleCompleted(step=0, num_prompt_tokens=2, num_sampled_tokens=0)
    with pytest.raises(Corrupt, match=message):
        views.answered(ROW, recorded(event), kinds.SamplesBody([], None, scores))


SAMPLED = kinds.SampleCompleted(step=0, num_prompt_tokens=1, num_sampled_tokens=0)


@pytest.mark.parametrize(
    ("event", "body"),
    [
        (SAMPLED, kinds.SamplesBody([], None, PromptScores(target_logprobs=logprobs(-math.inf)))),
        (DONE, kinds.LogprobsBody([logprobs(-1.0, math.nan)])),
        (DONE, kinds.LogprobsBody([logprobs(-1.0, -math.inf)])),
        (FORWARD, kinds.OutputsBody([logprobs(-1.0, -1.0)], [DatumOutputs(logits=logprobs(0.0, math.inf))])),
        (msgspec.structs.replace(DONE, loss=math.nan), kinds.LogprobsBody([logprobs(-1.0, -1.0)])),
        (msgspec.structs.replace(DONE, metrics={"kl": math.inf}), kinds.LogprobsBody([logprobs(-1.0, -1.0)])),
        (kinds.OptimStepCompleted(step=1, grad_norm=math.nan, state_digest=""), None),
    ],
)
def test_what_json_cannot_carry_fails_by_name(event: kinds.AnyEvent, body: kinds.Body | None) -> None:
    future = views.answered(ROW, recorded(event), body)
    assert (future.state, future.error, future.result) == ("failed", views.NOT_FINITE, None)


def test_run_points() -> None:
    row = RunPoint(step=1, at_us=0, learning_rate=0.1, grad_norm=math.inf, loss_sum=6.0, num_tokens=4, state_digest="d")
    point = views.run_point(row)
    assert (point.grad_norm, point.loss_per_token) == (None, 1.5)
    assert views.run_point(msgspec.structs.replace(row, num_tokens=0)).loss_per_token is None


def test_what_is_no_result_is_corrupt() -> None:
    with pytest.raises(Corrupt, match="is no result"):
        views.answered(ROW, recorded(kinds.BatchLost(batch="1.1", reason="")), None)
