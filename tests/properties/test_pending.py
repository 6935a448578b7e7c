"""Pending requests as a fold of the log: order, barriers, and what one cycle holds."""

from collections import defaultdict

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinkerbell.events import kinds
from tinkerbell.events.kinds import Recorded
from tinkerbell.executors.port import ForwardBackwardDone
from tinkerbell.scheduler.batching import Limits, Measure, Plan, Restore, cut, cut_samples, plan
from tinkerbell.scheduler.fair_share import FairShare
from tinkerbell.scheduler.pending import Pending, PendingRequest, Reason
from tinkerbell.types import AdamParams, LoraConfig, LossSpec, OutputSpec, SamplingParams

REQUESTS: dict[str, kinds.Request] = {
    "add_lora": kinds.AddLoraRequested(base_model="fake", lora=LoraConfig(), seed=1),
    "remove_lora": kinds.RemoveLoraRequested(),
    "forward": kinds.ForwardRequested(loss=LossSpec(), num_datums=1, num_tokens=10),
    "forward_backward": kinds.ForwardBackwardRequested(loss=LossSpec(), num_datums=1, num_tokens=10),
    "optim_step": kinds.OptimStepRequested(adam=AdamParams()),
    "sample": kinds.SampleRequested(params=SamplingParams(max_tokens=10), num_tokens=4),
    "save": kinds.SaveRequested(checkpoint="ck_a"),
    "load": kinds.LoadRequested(checkpoint="ck_a"),
}
LIMITS = Limits(batch_tokens=1000, max_adapters=16)


class Anything:
    """Contains everything: each adapter is in the executor."""

    def __contains__(self, item: object) -> bool:
        return True


class Log:
    """Makes events with positions."""

    def __init__(self) -> None:
        self.position = 0

    def __call__(
        self, event: kinds.Event, adapter: str | None = "a", tenant: str = "t", causation: int | None = None
    ) -> Recorded:
        self.position += 1
        return Recorded(
            position=self.position,
            stream="s",
            stream_version=self.position,
            at_us=0,
            tenant=tenant,
            adapter=adapter,
            seq=None,
            event=event,  # type: ignore[arg-type]
            body=None,
            blobs={},
            causation=causation,
            correlation=None,
            actor=None,
            hash="",
        )


def filled(*names: str, adapter: str | None = "a") -> tuple[Pending, list[PendingRequest]]:
    pending, log = Pending(), Log()
    return pending, [asked(pending, log, name, adapter) for name in names]


def asked(pending: Pending, log: Log, name: str, adapter: str | None = "a", tenant: str = "t") -> PendingRequest:
    request = pending.absorb(log(REQUESTS[name], adapter, tenant))
    assert request is not None
    if not request.measured:
        request.measure([10] if name != "sample" else [], cut([10], 100) if name != "sample" else [(0, 1)])
    return request


def planned(pending: Pending, limits: Limits = LIMITS) -> list[str]:
    batch = plan(pending, FairShare(), lambda *_: 1, limits, Anything())
    assert isinstance(batch, Plan)
    return [work.request.kind for work in batch.works]


@pytest.mark.parametrize(
    ("waiting", "together"),
    [
        (["forward_backward", "optim_step"], 2),
        (["forward_backward", "forward_backward", "optim_step", "forward_backward"], 3),
        (["optim_step", "optim_step"], 1),
        (["forward", "forward_backward", "sample", "optim_step"], 2),
        (["sample", "sample", "optim_step", "sample"], 2),
        (["sample", "forward_backward"], 1),
        (["add_lora", "forward_backward"], 1),
        (["save", "save"], 1),
        (["load", "sample"], 1),
        (["remove_lora"], 1),
    ],
)
def test_what_of_one_adapter_runs_together(waiting, together):
    pending, _ = filled(*waiting)
    assert planned(pending) == waiting[:together]


def test_one_adapter_leaves_room_for_others_of_the_same_lane_only():
    pending, log = Pending(), Log()
    asked(pending, log, "forward_backward", "a")
    asked(pending, log, "sample", "b")
    asked(pending, log, "optim_step", "c")
    assert planned(pending) == ["forward_backward", "optim_step"]


def test_samples_of_the_base_model_queue_by_tenant():
    pending, log = Pending(), Log()
    for tenant in ("t", "u", "t"):
        asked(pending, log, "sample", None, tenant)
    assert {(q.tenant, len(q.requests)) for t in pending.tenants for q in pending.queues(t)} == {
        ("t", 2),
        ("u", 1),
    }
    assert planned(pending) == ["sample"] * 3


def test_a_suspect_runs_alone():
    pending, requests = filled("forward_backward", "forward_backward", "optim_step")
    requests[0].deaths = 1
    assert planned(pending) == ["forward_backward"]
    pending.finish(requests[0])
    requests[2].deaths = 1
    assert planned(pending) == ["forward_backward"]
    pending.finish(requests[1])
    assert planned(pending) == ["optim_step"]


def test_a_suspect_elsewhere_does_not_join():
    pending, log = Pending(), Log()
    asked(pending, log, "forward_backward", "a", "t")
    asked(pending, log, "forward_backward", "b", "u").deaths = 1
    assert planned(pending) == ["forward_backward"]


def test_adapters_bound_a_batch():
    pending, log = Pending(), Log()
    for name in "abcd":
        asked(pending, log, "forward_backward", name)
        asked(pending, log, "optim_step", name)
    works = planned(pending, Limits(batch_tokens=1000, max_adapters=2))
    assert works.count("forward_backward") == works.count("optim_step") == 2


def test_few_requests_of_a_batch_get_logits():
    """Their chunks may share it; likeliest tokens are small."""
    pending, log = Pending(), Log()
    greedy = kinds.ForwardRequested(
        loss=LossSpec(), num_datums=2, num_tokens=20, outputs=OutputSpec(logits=True, top_k=1)
    )
    for name in "abcdef":
        pending.absorb(log(greedy, name)).measure([10, 10], [(0, 1), (1, 2)])
    sizes = []
    while (batch := plan(pending, FairShare(), lambda *_: 1, LIMITS, Anything())) is not None:
        assert isinstance(batch, Plan)
        requests = {work.request.position: work.request for work in batch.works}
        sizes.append(len(requests))
        for request in requests.values():
            pending.finish(request)
    assert sizes == [4, 2]
    lone = pending.absorb(log(greedy, "g"))
    lone.measure([10] * 6, [(n, n + 1) for n in range(6)])
    batch = plan(pending, FairShare(), lambda *_: 1, LIMITS, Anything())
    assert isinstance(batch, Plan) and len(batch.works) == 6
    pending.finish(lone)
    modest = msgspec.structs.replace(greedy, outputs=OutputSpec(top_k=64))
    for name in "abcdef":
        pending.absorb(log(modest, name)).measure([20], [(0, 2)])
    batch = plan(pending, FairShare(), lambda *_: 1, LIMITS, Anything())
    assert isinstance(batch, Plan) and len(batch.works) == 6


def test_a_request_too_large_for_any_batch_runs_alone():
    pending, log = Pending(), Log()
    request = asked(pending, log, "forward_backward", "a")
    request.measure([5000, 10], cut([5000, 10], 100))
    asked(pending, log, "forward_backward", "b", "u")
    batch = plan(pending, FairShare(), lambda *_: 1, LIMITS, Anything())
    assert isinstance(batch, Plan)
    assert [(work.request, work.chunk) for work in batch.works] == [(request, 0)]


def test_what_is_missing_is_said_before_anything_is_charged():
    pending, log = Pending(), Log()
    shares = FairShare()
    request = pending.absorb(log(REQUESTS["forward_backward"]))
    assert plan(pending, shares, lambda *_: 1, LIMITS, set()) == Restore(request)
    assert plan(pending, shares, lambda *_: 1, LIMITS, {"a"}) == Measure(request)
    request.measure([10], [(0, 1)])
    assert isinstance(plan(pending, shares, lambda *_: 1, LIMITS, {"a"}), Plan)


@pytest.mark.parametrize("kind", ["add_lora", "load", "remove_lora"])
def test_what_replaces_the_state_does_not_need_it(kind):
    pending, _ = filled(kind)
    assert isinstance(plan(pending, FairShare(), lambda *_: 1, LIMITS, set()), Plan)


def test_chunks_go_on_where_the_last_batch_ended():
    pending, (request,) = filled("forward_backward")
    request.measure([100] * 25, cut([100] * 25, 100))
    sizes = []
    while len(pending):
        batch = plan(pending, FairShare(), lambda *_: 1, LIMITS, Anything())
        assert isinstance(batch, Plan)
        assert [work.chunk for work in batch.works] == list(
            range(len(request.outcomes), len(request.outcomes) + len(batch.works))
        )
        sizes.append(len(batch.works))
        done = ForwardBackwardDone(request=request.position, loss=0.0, metrics={}, logprobs=[])
        request.outcomes.extend([done] * len(batch.works))
        if batch.works[-1].last:
            pending.finish(request)
    assert sizes == [10, 10, 5]


def test_a_new_executor_starts_requests_afresh():
    pending, (request,) = filled("forward_backward")
    request.outcomes.append(ForwardBackwardDone(request=1, loss=0.0, metrics={}, logprobs=[]))
    pending.rewind()
    assert request.outcomes == []


def test_a_blocked_adapter_waits_while_others_run():
    pending, log = Pending(), Log()
    pending.block("t", "a")
    asked(pending, log, "forward_backward", "a")
    assert plan(pending, FairShare(), lambda *_: 1, LIMITS, Anything()) is None
    asked(pending, log, "forward_backward", "b")
    pending.block("t", "b")
    pending.unblock("t", "a")
    batch = plan(pending, FairShare(), lambda *_: 1, LIMITS, Anything())
    assert isinstance(batch, Plan)
    assert [work.request.adapter for work in batch.works] == ["a"]


def test_a_cancelled_sample_leaves_its_queue_from_anywhere_and_the_rest_keep_their_order():
    pending, log = Pending(), Log()
    names = ("forward_backward", "sample", "sample", "optim_step", "sample")
    first, *_, step, last = requests = [asked(pending, log, name) for name in names]
    for request in (requests[2], requests[1]):
        assert pending.absorb(log(kinds.SampleCancelled(request=request.position), adapter=None)) is None
    assert len(pending) == 5, "it has no result yet"
    assert pending.take_cancelled() == requests[1:3]
    assert pending.take_cancelled() == []
    assert [request for queue in pending.queues("t") for request in queue.requests] == [first, step, last]
    assert planned(pending) == ["forward_backward", "optim_step"]
    failure = kinds.SampleFailed(category="user", code="cancelled", message="no")
    for request in requests[1:3]:
        pending.absorb(log(failure, causation=request.position))
    assert len(pending) == 3


def test_a_cancelled_sample_is_charged_to_nobody_and_needs_no_adapter():
    pending, log, shares = Pending(), Log(), FairShare()
    cancelled, other = asked(pending, log, "sample", "a", "t"), asked(pending, log, "sample", "b", "u")
    pending.cancel(cancelled.position)
    assert pending.take_cancelled() == [cancelled]
    batch = plan(pending, shares, lambda *_: 1, LIMITS, {"b"})
    assert isinstance(batch, Plan) and batch.requests == [other]
    assert list(pending.tenants) == ["u"]


def test_what_has_its_result_is_not_cancelled():
    pending, log = Pending(), Log()
    done, gone, after = (asked(pending, log, "sample") for _ in range(3))
    for request in (done, gone):
        pending.cancel(request.position)
    pending.finish(done)
    pending.absorb(log(kinds.SampleCompleted(step=0, num_prompt_tokens=1, num_sampled_tokens=1), causation=2))
    pending.cancel(gone.position)
    assert pending.take_cancelled() == []
    assert list(pending) == [after]


def test_nothing_overtakes():
    pending, requests = filled("forward_backward", "optim_step")
    with pytest.raises(AssertionError, match="overtake"):
        pending.finish(requests[1])


def test_requests_to_an_ended_adapter_are_orphans_until_the_log_knows():
    pending, log = Pending(), Log()
    remove = asked(pending, log, "remove_lora")
    reason = Reason("user", "not-found", "gone")
    waiting = asked(pending, log, "sample")
    pending.finish(remove)
    pending.end("t", "a", reason)
    assert pending.orphans() == [("t", "a", reason)]
    assert pending.drop("t", "a") == [waiting]
    assert pending.orphans() == []
    late = asked(pending, log, "sample")
    assert pending.orphans() == [("t", "a", reason)]
    assert pending.drop("t", "a") == [late]
    assert pending.orphans() == [] and len(pending) == 0
    pending.absorb(log(kinds.RemoveLoraCompleted(), causation=remove.position))
    asked(pending, log, "sample")
    assert pending.orphans() == []


@given(num_samples=st.integers(1, 200), most_tokens=st.integers(2, 5000), batch_tokens=st.integers(1, 9000))
def test_samples_are_cut_so_that_each_part_fits_a_batch(num_samples, most_tokens, batch_tokens):
    parts = cut_samples(num_samples, most_tokens, batch_tokens)
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(num_samples))
    assert all(stop - start == 1 or (stop - start) * most_tokens <= batch_tokens for start, stop in parts)
    largest = max(stop - start for start, stop in parts)
    assert len(parts) == 1 or (largest + 1) * most_tokens > batch_tokens, "cut finer than needed"


@pytest.mark.parametrize("asked_before_the_end", [False, True])
@pytest.mark.parametrize("num_before", [0, 1, 2])
@pytest.mark.parametrize("num_after", [0, 1, 2])
def test_whatever_the_log_accepted_before_an_adapter_ended_is_answered(asked_before_the_end, num_before, num_after):
    """The executor removes the adapter, requests come in, the result is written, the scheduler looks: in any
    order."""
    pending, log = Pending(), Log()
    remove = asked(pending, log, "remove_lora")
    reason = Reason("user", "not-found", "gone")
    waiting = [asked(pending, log, "sample") for _ in range(num_before)]
    if not asked_before_the_end:
        pending.finish(remove)
        pending.end("t", "a", reason)
    waiting += [asked(pending, log, "optim_step") for _ in range(num_after)]
    if asked_before_the_end:
        pending.finish(remove)
        pending.end("t", "a", reason)
    pending.absorb(log(kinds.RemoveLoraCompleted(), causation=remove.position))
    assert pending.orphans() == ([("t", "a", reason)] if waiting else [])
    assert pending.drop("t", "a") == waiting
    assert pending.orphans() == [] and len(pending) == 0


def test_events_known_already_are_ignored():
    pending, log = Pending(after=2), Log()
    assert pending.absorb(log(REQUESTS["sample"])) is None
    assert pending.absorb(log(REQUESTS["sample"])) is None
    assert pending.absorb(log(REQUESTS["sample"])) is not None


@given(
    script=st.lists(
        st.tuples(
            st.sampled_from(["ask", "answer"]),
            st.sampled_from(["forward_backward", "optim_step", "sample"]),
            st.sampled_from(["a", "b", None]),
            st.sampled_from(["t", "u"]),
            st.integers(0, 5),
        ),
        max_size=80,
    )
)
def test_pending_is_what_was_asked_and_not_answered(script):
    pending, log = Pending(), Log()
    open_requests: dict[int, tuple[str, str | None]] = {}
    for what, kind, adapter, tenant, pick in script:
        if what == "ask" or not open_requests:
            name = f"{tenant}/{adapter}" if adapter else None
            request = pending.absorb(log(REQUESTS[kind if adapter else "sample"], name, tenant))
            open_requests[request.position] = (tenant, name)
        else:
            position = sorted(open_requests)[pick % len(open_requests)]
            tenant, name = open_requests.pop(position)
            event = kinds.SampleCompleted(step=0, num_prompt_tokens=1, num_sampled_tokens=1)
            assert pending.absorb(log(event, name, tenant, causation=position)) is None
    queues = defaultdict(list)
    for position, key in open_requests.items():
        queues[key].append(position)
    found = {
        (queue.tenant, queue.adapter): [request.position for request in queue.requests]
        for tenant in pending.tenants
        for queue in pending.queues(tenant)
    }
    assert found == {key: sorted(positions) for key, positions in queues.items()}
    assert len(pending) == len(open_requests)
