"""From executor answers to result events."""

import hashlib

import pytest

from tinkerbell.events import kinds
from tinkerbell.events.kinds import FAILED
from tinkerbell.executors.port import (
    ForwardBackwardDone,
    OptimStepDone,
    SampleDone,
    UnitFailed,
)
from tinkerbell.scheduler import results
from tinkerbell.scheduler.batching import Plan, Work
from tinkerbell.scheduler.cost import CostModel
from tinkerbell.scheduler.fair_share import FairShare
from tinkerbell.scheduler.pending import LANES, PendingRequest
from tinkerbell.scheduler.residency import Residency, Resident
from tinkerbell.scheduler.settlement import Settlement
from tinkerbell.types import AdamParams, LoraConfig, LossSpec, PromptScores, SampledSequence, SamplingParams

DATA = kinds.ForwardBackwardRequested(loss=LossSpec(), num_datums=3, num_tokens=9)
STEP = kinds.OptimStepRequested(adam=AdamParams())
SAMPLE = kinds.SampleRequested(params=SamplingParams(), num_tokens=5)


def request(
    position: int, kind: str, event: kinds.Request, chunks: int = 1, adapter: str | None = "a"
) -> PendingRequest:
    made = PendingRequest(position, "t", adapter, position, event, kind, LANES[kind])  # type: ignore[arg-type]
    made.measure([3] * chunks, [(i, i + 1) for i in range(chunks)])
    return made


def part(position: int, loss: float, metric: float, logprobs: bytes) -> ForwardBackwardDone:
    return ForwardBackwardDone(request=position, loss=loss, metrics={"m": metric}, logprobs=[logprobs])


@pytest.fixture
def settlement():
    shares, residency = FairShare(), Residency()
    shares.backlog(["t"])
    shares.backlog_queues("t", ["a", ""])
    residency.put(Resident("t", "a", 1000, 3, "d3", 0, 1))
    return Settlement(CostModel(), shares, residency), residency, shares


def batch_of(*works: tuple[PendingRequest, int]) -> Plan:
    return Plan(works[0][0].lane, [Work(asked, chunk, 100) for asked, chunk in works])


def test_chunks_add_up_in_datum_order(settlement):
    settle, _, _ = settlement
    data = request(7, "forward_backward", DATA, chunks=3)
    first, second = part(7, 1.5, 1.0, b"aaaa"), part(7, 2.0, 2.0, b"bbbb")
    assert settle.answers(batch_of((data, 0), (data, 1)), "1.1", [first, second]) == []
    (answer,) = settle.answers(batch_of((data, 2)), "1.2", [part(7, 0.25, 4.0, b"cccc")])
    event, body = answer.event, answer.body
    assert isinstance(event, kinds.ForwardBackwardCompleted)
    assert (event.loss, event.metrics, event.num_tokens, event.batch) == (3.75, {"m": 7.0}, 9, "1.2")
    assert body.logprobs == [b"aaaa", b"bbbb", b"cccc"]
    assert event.logprobs_digest == results.logprobs_digest(body.logprobs)


def test_the_digest_of_logprobs_knows_where_a_datum_ends():
    assert results.logprobs_digest([b"aaaa", b"bbbb"]) != results.logprobs_digest([b"aaaabbbb"])
    assert results.logprobs_digest([b"aaaa"]) == hashlib.sha256(b"\4" + bytes(7) + b"aaaa").hexdigest()


def test_one_failed_chunk_fails_the_request_once(settlement):
    settle, _, _ = settlement
    data = request(7, "forward_backward", DATA, chunks=3)
    bad = UnitFailed(request=7, category="user", code="invalid-request", message="no")
    after = UnitFailed(request=7, category="user", code="other", message="an earlier chunk failed")
    (answer,) = settle.answers(batch_of((data, 0), (data, 1), (data, 2)), "1.1", [part(7, 1, 1, b"a"), bad, after])
    assert isinstance(answer.event, kinds.ForwardBackwardFailed)
    assert (answer.event.category, answer.event.code, answer.event.message) == (
        "user",
        "invalid-request",
        "no",
    )


def test_a_step_moves_the_recovery_boundary(settlement):
    settle, residency, _ = settlement
    step = request(9, "optim_step", STEP)
    done = OptimStepDone(request=9, step=4, grad_norm=0.5, state_digest="d4", gradient_digest="g4", weights_digest="w4")
    (answer,) = settle.answers(batch_of((step, 0)), "1.1", [done])
    assert answer.event == kinds.OptimStepCompleted(
        batch="1.1", step=4, grad_norm=0.5, state_digest="d4", gradient_digest="g4", weights_digest="w4"
    )
    resident = residency["a"]
    assert (resident.step, resident.boundary_seq, resident.boundary_position) == (4, 9, 9)
    assert (resident.steps_ahead, resident.state_digest) == (1, "d4")


def test_a_sample_names_the_weights_it_saw(settlement):
    settle, _, _ = settlement
    sequences = [SampledSequence(b"\0" * 8, b"\0" * 8, "length")]
    done = [SampleDone(request=n, sequences=sequences, prompt_logprobs=None) for n in (5, 6)]
    asked, base = request(5, "sample", SAMPLE), request(6, "sample", SAMPLE, adapter=None)
    with_adapter, without = settle.answers(batch_of((asked, 0), (base, 0)), "1.1", done)
    assert (with_adapter.event.step, without.event.step) == (3, 0)
    assert (with_adapter.event.num_prompt_tokens, with_adapter.event.num_sampled_tokens) == (5, 2)
    assert results.stream_of(asked) == "adapter/a"
    assert results.stream_of(base) == "tenant/t"


def test_a_prompt_is_scored_with_the_first_of_its_samples(settlement):
    settle, _, _ = settlement
    scores = PromptScores(top_tokens=b"t" * 4, top_logprobs=b"l" * 4)
    sequences = [SampledSequence(b"a" * 4, b"b" * 4, "length", b"c" * 4, b"d" * 4)]
    first = SampleDone(request=5, sequences=sequences, prompt_logprobs=b"p" * 4, prompt_scores=scores)
    second = SampleDone(request=5, sequences=sequences, prompt_logprobs=None)
    asked = request(5, "sample", SAMPLE, chunks=2)
    (answer,) = settle.answers(batch_of((asked, 0), (asked, 1)), "1.1", [first, second])
    assert answer.body == kinds.SamplesBody(sequences * 2, b"p" * 4, scores)


def test_charges_sum_to_the_measured_time_and_follow_the_request(settlement):
    settle, _, shares = settlement
    data, step = request(7, "forward_backward", DATA, chunks=2), request(8, "optim_step", STEP)
    batch = batch_of((data, 0), (data, 1), (step, 0))
    outcomes = [part(7, 1, 1, b"a"), part(7, 1, 1, b"a"), None]
    for _ in range(3):
        for _work in batch.works:
            shares.charge("t", "a", 100)
    charges = settle.charge(batch, outcomes, 1001)
    assert sum(us for _, us in charges) == 1001
    assert [position for position, _ in charges] == [7, 8]
    assert data.cost_us + step.cost_us == 1001
    assert shares.time_of("t")[0] == pytest.approx(900 - 300 + 1001)


def test_a_lost_batch_costs_nobody(settlement):
    settle, _, shares = settlement
    data = request(7, "forward_backward", DATA, chunks=2)
    shares.charge("t", "a", 200)
    settle.refund(batch_of((data, 0), (data, 1)))
    assert shares.time_of("t")[0] == 0
    assert data.cost_us == 0


def test_results_out_of_order_are_a_bug(settlement):
    settle, _, _ = settlement
    data = request(7, "forward_backward", DATA)
    with pytest.raises(AssertionError, match="order"):
        settle.answers(batch_of((data, 0)), "1.1", [part(8, 1, 1, b"a")])


@pytest.mark.parametrize("kind", sorted(LANES))
def test_every_kind_can_fail(kind):
    asked = PendingRequest(3, "t", "a", 0, _REQUESTS[kind], kind, LANES[kind], cost_us=11)  # type: ignore[arg-type]
    event = results.failed(asked, "server", "poison", "why", "1.1")
    assert type(event) is FAILED[kind]
    assert (event.cost_us, event.code) == (11, "poison")


_REQUESTS: dict[str, kinds.Request] = {
    "add_lora": kinds.AddLoraRequested(base_model="m", lora=LoraConfig(), seed=1),
    "remove_lora": kinds.RemoveLoraRequested(),
    "forward": kinds.ForwardRequested(loss=LossSpec(), num_datums=1, num_tokens=1),
    "forward_backward": DATA,
    "optim_step": STEP,
    "sample": SAMPLE,
    "save": kinds.SaveRequested(checkpoint="ck"),
    "load": kinds.LoadRequested(checkpoint="ck"),
}
