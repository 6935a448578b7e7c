"""Fair share and batch planning, as properties P1 to P6 over random loads, tenants and weights."""

from collections import defaultdict
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinkerbell.events import kinds
from tinkerbell.events.kinds import Recorded
from tinkerbell.scheduler.batching import Limits, Measure, Plan, Restore, cut, plan
from tinkerbell.scheduler.fair_share import FairShare
from tinkerbell.scheduler.pending import Pending, PendingRequest
from tinkerbell.types import AdamParams, LossSpec, SamplingParams

CHUNK = 1000
BUDGET = 4000
OPTIM_US = 50
EVERYTHING = type("Everything", (), {"__contains__": lambda self, item: True})()


class Load:
    """Requests with made-up positions, priced at one microsecond a token."""

    def __init__(
        self,
        weights: dict[str, float],
        *,
        credit: float = 0.0,
        slack: float = 0.0,
        adapters: int = 99,
        most_us: float = float("inf"),
    ) -> None:
        self.pending = Pending()
        self.shares = FairShare(credit_us=credit)
        for tenant, weight in weights.items():
            self.shares.set_weight(tenant, weight)
        self.weights = weights
        self.limits = Limits(batch_tokens=BUDGET, max_adapters=adapters, slack_us=slack, most_us=most_us)
        self.position = 0
        self.asked: dict[int, int] = {}
        self.served: dict[int, int] = defaultdict(int)

    def add(self, tenant: str, adapter: str | None, event: kinds.Event) -> PendingRequest:
        self.position += 1
        request = self.pending.absorb(recorded(self.position, tenant, adapter, event))
        assert request is not None
        return request

    def train(self, tenant: str, adapter: str, tokens: int) -> PendingRequest:
        event = kinds.ForwardBackwardRequested(loss=LossSpec(), num_datums=1, num_tokens=tokens)
        request = self.add(tenant, f"{tenant}/{adapter}", event)
        lengths = [400] * (tokens // 400) + ([tokens % 400] if tokens % 400 else [])
        request.measure(lengths, cut(lengths, CHUNK))
        self.asked[request.position] = tokens
        return request

    def optim(self, tenant: str, adapter: str) -> PendingRequest:
        request = self.add(tenant, f"{tenant}/{adapter}", kinds.OptimStepRequested(adam=AdamParams()))
        self.asked[request.position] = OPTIM_US
        return request

    def sample(self, tenant: str, adapter: str | None, tokens: int) -> PendingRequest:
        event = kinds.SampleRequested(params=SamplingParams(max_tokens=tokens), num_tokens=1)
        request = self.add(tenant, f"{tenant}/{adapter}" if adapter else None, event)
        request.measure([], [(0, 1)])
        self.asked[request.position] = tokens + 1
        return request

    def price(self, request: PendingRequest, chunk: int) -> int:
        return OPTIM_US if request.kind == "optim_step" else request.chunk_tokens(chunk)

    def plan(self) -> Plan | None:
        planned = plan(self.pending, self.shares, self.price, self.limits, EVERYTHING)
        assert not isinstance(planned, Measure | Restore)
        return planned

    def run(self, planned: Plan) -> Iterator[tuple[PendingRequest, int, bool]]:
        """Each unit with its cost and whether its request ended with it."""
        for work in planned.works:
            request = work.request
            self.served[request.position] += work.estimated_us
            if not work.last:
                request.outcomes.append(None)  # type: ignore[arg-type]
            else:
                self.pending.finish(request)
            yield request, work.estimated_us, work.last


def recorded(position: int, tenant: str, adapter: str | None, event: kinds.Event, **more: object) -> Recorded:
    values: dict[str, object] = {
        "position": position,
        "stream": f"adapter/{adapter}",
        "stream_version": position,
        "at_us": position,
        "tenant": tenant,
        "adapter": adapter,
        "seq": None,
        "event": event,
        "body": None,
        "blobs": {},
        "causation": None,
        "correlation": None,
        "actor": None,
        "hash": "",
    }
    return Recorded(**{**values, **more})  # type: ignore[arg-type]


WEIGHTS = st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=5)
SCRIPT = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.integers(0, 2),
        st.integers(1, 5000),
        st.sampled_from(["train", "step", "sample", "base"]),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(
    weights=WEIGHTS,
    script=SCRIPT,
    first=st.integers(3, 30),
    credit=st.sampled_from([0.0, 3000.0]),
    slack=st.sampled_from([0.0, 2000.0]),
    adapters=st.sampled_from([1, 3, 99]),
    most_us=st.sampled_from([1.0, 1500.0, float("inf")]),
)
def test_the_service_gap_is_bounded(weights, script, first, credit, slack, adapters, most_us):
    _hold_to_the_bound(weights, script, first, credit, slack, slack, adapters, most_us)


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, script=SCRIPT, first=st.integers(3, 30), adapters=st.sampled_from([1, 3, 99]))
def test_as_shipped_the_bound_holds_among_tenants_that_never_wait_for_themselves(weights, script, first, adapters):
    """Without a limit to the slack: for gradients only, where nothing is behind its own optim_step or in another
    lane."""
    gradients = [(number, adapter, tokens, "train") for number, adapter, tokens, _ in script]
    _hold_to_the_bound(weights, gradients, first, 0.0, float("inf"), 0.0, adapters)


def test_slack_counts_once_for_each_of_a_pair():
    """Each is served past the other by the slack and a unit: first t1, whose samples t0 cannot join, then t0."""
    script = [(1, 0, 899, "sample"), (1, 0, 999, "sample"), (0, 0, 2626, "step"), (1, 0, 899, "sample")]
    _hold_to_the_bound([0.5, 1.0], [*script, (1, 0, 1, "sample")], 4, 0.0, 2000.0, 2000.0, 1)


def test_what_rides_along_lifts_nobody():
    """t1 arrives after t2's expensive optim_step rode along: it must not be lifted past the waiting t0 by that."""
    script = [(0, 0, 1, "train"), (0, 0, 1, "train"), (2, 0, 201, "step"), (0, 0, 2150, "step"), (1, 0, 1, "train")]
    _hold_to_the_bound([4.0, 4.0, 0.5], script, 3, 0.0, 0.0, 0.0, 1)


def _hold_to_the_bound(weights, script, first, credit, slack, slack_in_bound, adapters, most_us=float("inf")):
    names = {f"t{i}": weight for i, weight in enumerate(weights)}
    load = Load(names, credit=credit, slack=slack, adapters=adapters, most_us=most_us)
    waiting: dict[str, int] = dict.fromkeys(names, 0)

    def push(step: tuple[int, int, int, str]) -> None:
        number, adapter, tokens, what = step
        tenant = f"t{number % len(names)}"
        if what in ("sample", "base"):
            load.sample(tenant, f"a{adapter}" if what == "sample" else None, min(tokens, CHUNK - 1))
        else:
            load.train(tenant, f"a{adapter}", tokens)
            if what == "step":
                load.optim(tenant, f"a{adapter}")
                waiting[tenant] += 1
        waiting[tenant] += 1

    arrivals = iter(script)
    for _ in range(first):
        if (step := next(arrivals, None)) is not None:
            push(step)
    service: dict[str, float] = dict.fromkeys(names, 0.0)
    spans: dict[tuple[str, str], list[float]] = {}
    order: dict[str, list[int]] = defaultdict(list)
    rounds = 0
    while any(waiting.values()):
        rounds += 1
        assert rounds < 5000, "P5: starvation"
        planned = load.plan()
        assert planned is not None and planned.works, "P2: work waits but the batch is empty"
        tokens = [work.request.chunk_tokens(work.chunk) for work in planned.works]
        assert sum(tokens) <= max(BUDGET, tokens[0])
        timed = [work.estimated_us for work in planned.works if work.request.kind != "optim_step"]
        rides = len(planned.works) - len(timed)
        assert sum(timed) <= max(most_us, timed[0] if timed else 0.0) + OPTIM_US * rides
        assert len({w.request.adapter for w in planned.works if w.request.adapter}) <= adapters
        assert {w.request.lane for w in planned.works} == {planned.lane}
        for request, cost, ended in load.run(planned):
            tenant = request.tenant
            assert cost <= CHUNK, "P6"
            for other in names:
                if other != tenant and waiting[other]:
                    pair = tuple(sorted((other, tenant)))
                    gap = service[pair[0]] - service[pair[1]]
                    spans.setdefault(pair, [gap, gap])
            service[tenant] += cost / names[tenant]
            order[request.adapter or tenant].append(request.position)
            for pair, span in spans.items():
                if tenant in pair:
                    gap = service[pair[0]] - service[pair[1]]
                    span[0], span[1] = min(span[0], gap), max(span[1], gap)
                    smallest = min(names[pair[0]], names[pair[1]])
                    bound = sum((CHUNK + OPTIM_US) / names[name] for name in pair)
                    bound += (credit + 2 * OPTIM_US) / smallest + 2 * slack_in_bound
                    assert span[1] - span[0] <= bound + 1e-6, f"P4: {span} > {bound}"
            if ended:
                waiting[tenant] -= 1
                if not waiting[tenant]:
                    spans = {pair: span for pair, span in spans.items() if tenant not in pair}
        if (step := next(arrivals, None)) is not None:
            push(step)
    assert dict(load.served) == load.asked, "P1: work was lost or done twice"
    for positions in order.values():
        assert positions == sorted(positions), "P3: overtaken"


def test_a_thousand_tenants_share_in_proportion_to_their_weights():
    names = {f"t{i}": 1.0 + i % 3 for i in range(1000)}
    load = Load(names, slack=float("inf"), adapters=1000)
    for tenant in names:
        for _ in range(12):
            load.train(tenant, "a", CHUNK)
    service: dict[str, int] = defaultdict(int)
    for _ in range(1000):
        planned = load.plan()
        assert planned is not None
        for request, cost, _ended in load.run(planned):
            service[request.tenant] += cost
    shares = [service[tenant] / weight for tenant, weight in names.items()]
    assert max(shares) - min(shares) <= 2 * CHUNK


def test_a_flood_does_not_delay_a_light_tenant():
    load = Load({"flood": 1.0, "light": 1.0}, slack=float("inf"))
    for number in range(300):
        load.train("flood", f"a{number % 32}", 5000)
    for _ in range(20):
        assert load.plan() is not None
    load.train("light", "a", 500)
    load.optim("light", "a")
    planned = load.plan()
    assert planned is not None
    light = [work.request.kind for work in planned.works if work.request.tenant == "light"]
    assert light == ["forward_backward", "optim_step"]


def test_idle_time_is_not_saved_up():
    load = Load({"early": 1.0, "late": 1.0}, slack=float("inf"))
    for _ in range(60):
        load.train("early", "a", CHUNK)
    for _ in range(10):
        planned = load.plan()
        assert planned is not None
        list(load.run(planned))
    for _ in range(60):
        load.train("late", "a", CHUNK)
    planned = load.plan()
    assert planned is not None
    turns = [work.request.tenant for work in planned.works]
    assert abs(turns.count("early") - turns.count("late")) <= 1


@pytest.mark.parametrize(("credit", "expected"), [(0.0, 0), (3000.0, 3)])
def test_credit_lets_a_returning_tenant_go_ahead(credit, expected):
    shares = FairShare(credit_us=credit)
    shares.backlog(["busy"])
    shares.backlog_queues("busy", ["a"])
    for _ in range(10):
        shares.charge("busy", "a", 1000)
    shares.backlog(["busy", "late"])
    lag = (10_000 - 1000) - shares.time_of("late")[0]
    assert lag == expected * 1000


def test_measured_cost_replaces_the_estimate():
    shares = FairShare()
    shares.set_weight("heavy", 2.0)
    shares.backlog(["heavy"])
    shares.backlog_queues("heavy", ["a"])
    shares.charge("heavy", "a", 100)
    shares.correct("heavy", "a", 300)
    assert shares.time_of("heavy")[0] == 200.0
    assert shares.time_of_queue("heavy", "a") == 400.0


def test_idle_members_are_forgotten_once_that_changes_nothing():
    shares = FairShare()
    shares.backlog(["steady"])
    for number in range(500):
        shares.backlog(["steady", f"t{number}"])
        for tenant in ("steady", f"t{number}"):
            shares.backlog_queues(tenant, ["a"])
            shares.charge(tenant, "a", 10)
    shares.charge("t499", "a", 1000)
    ahead = shares.time_of("t499")[0]
    shares.backlog(["steady"])
    shares.backlog(["steady", "t499", "fresh"])
    assert shares.time_of("t499")[0] == ahead > shares.time_of("fresh")[0]
    assert len(shares._tenants.times) < 200


def test_a_new_busy_period_starts_level():
    shares = FairShare()
    shares.backlog(["first"])
    shares.backlog_queues("first", ["a"])
    shares.charge("first", "a", 1000)
    shares.rest()
    shares.backlog(["first", "second"])
    assert shares.time_of("first")[0] == shares.time_of("second")[0] == 1000


def test_adapters_of_one_tenant_share_its_part():
    load = Load({"one": 1.0}, slack=float("inf"))
    for _ in range(40):
        load.train("one", "greedy", CHUNK)
    for _ in range(4):
        load.train("one", "modest", CHUNK)
    planned = load.plan()
    assert planned is not None
    assert [work.request.adapter for work in planned.works].count("one/modest") == 2


LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=50)


@given(lengths=LENGTHS, chunk_tokens=st.integers(1, 4000))
def test_cut_covers_in_order_and_respects_the_bound(lengths, chunk_tokens):
    chunks = cut(lengths, chunk_tokens)
    assert [i for start, stop in chunks for i in range(start, stop)] == list(range(len(lengths)))
    for (start, stop), following in zip(chunks, [*chunks[1:], None], strict=True):
        total = sum(lengths[start:stop])
        assert total <= chunk_tokens or stop - start == 1
        if following is not None:
            assert total + lengths[stop] > chunk_tokens, "cut earlier than needed"


def test_cut_of_nothing_is_nothing():
    assert cut([], 10) == []


def test_a_tenant_keeps_its_share_while_one_of_its_adapters_is_held_back():
    load = Load({"x": 1.0, "y": 1.0}, slack=float("inf"))
    served = {"x": 0, "y": 0}
    for _ in range(400):
        load.train("y", "a", CHUNK)
        load.train("x", "big", CHUNK)
    for number in range(40):
        load.train("x", "small", 10)
        if number % 2 == 0:
            # A save of it is being written.
            load.pending.block("x", "x/big")
        planned = load.plan()
        assert planned is not None
        for request, cost, _ in load.run(planned):
            served[request.tenant] += cost
        load.pending.unblock("x", "x/big")
    # A batch at most goes to the other alone while this one is held back; it gets that back in the next.
    assert served["y"] - served["x"] <= BUDGET


def test_no_weight_stops_a_tenant_for_ever():
    shares = FairShare()
    shares.set_weight("t", 0.0)
    assert shares.weight("t") > 0
