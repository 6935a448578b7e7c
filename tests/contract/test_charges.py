"""Who pays for what in a batch: a neighbour of an expensive request pays about what it pays alone."""

import statistics
from collections.abc import Iterator

import pytest

from tests.support.executor_driver import ints, random_data
from tests.support.tiny_model import write_tiny_model
from tinkerbell.events import kinds
from tinkerbell.executors.fake import FakeExecutor
from tinkerbell.executors.hf.executor import HFExecutor
from tinkerbell.executors.port import Batch, Executor, ForwardBackward, Sample, Unit, UnitFailed
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.scheduler.batching import Plan, Work
from tinkerbell.scheduler.cost import CostModel
from tinkerbell.scheduler.fair_share import FairShare
from tinkerbell.scheduler.pending import LANES, PendingRequest
from tinkerbell.scheduler.residency import Residency
from tinkerbell.scheduler.settlement import Settlement
from tinkerbell.types import LoraConfig, LossSpec, OutputSpec, SamplingParams

ROUNDS = 5
MOST = 4.0
"""Times what it costs alone: a batch's fixed part is shared, and clocks are not exact."""
VOCAB, LENGTH = 250, 400

Ask = tuple[kinds.ForwardRequested | kinds.SampleRequested, Unit]


@pytest.fixture(scope="module", params=["fake", "hf"])
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    if request.param == "fake":
        made: Executor = FakeExecutor(ExecutorOptions())
    else:
        directory = write_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=8192)
        made = HFExecutor(ExecutorOptions(model=str(directory), threads=1))
    for name in ("ad_1", "ad_2"):
        made.create(name, LoraConfig(rank=2, targets=("q_proj",)), 1)
    yield made


def sample(position: int, length: int, targets: int = 0, **params: int) -> Ask:
    settings = SamplingParams(max_tokens=1, seed=1, **params)  # type: ignore[arg-type]
    tokens = [number % VOCAB for number in range(length)]
    event = kinds.SampleRequested(params=settings, num_tokens=length)
    unit = Sample(
        request=position,
        adapter=None,
        prompt=ints(tokens),
        params=settings,
        seed=1,
        prompt_targets=ints([7] * (targets * length)) if targets else None,
    )
    return event, unit


def forward(position: int, length: int, adapter: str, outputs: OutputSpec | None = None) -> Ask:
    event = kinds.ForwardRequested(loss=LossSpec(), num_datums=1, num_tokens=length, outputs=outputs)
    unit = ForwardBackward(
        request=position,
        adapter=adapter,
        data=random_data(1, (length,), VOCAB),
        loss=LossSpec(),
        outputs=outputs,
        backward=False,
    )
    return event, unit


def charges(executor: Executor, *asked: Ask) -> dict[int, int]:
    """Request -> microseconds, after the batch ran."""
    requests = []
    for event, unit in asked:
        kind = kinds.kind_of(event)
        made = PendingRequest(unit.request, f"t{unit.request}", unit.adapter, None, event, kind, LANES[kind])
        is_sample = isinstance(event, kinds.SampleRequested)
        made.measure([] if is_sample else [event.num_tokens], [(0, 1)])
        requests.append(made)
    result = executor.run(Batch(id="1", units=[unit for _, unit in asked]))
    assert not any(isinstance(each, UnitFailed) for each in result.results), result.results
    settlement = Settlement(CostModel(), FairShare(), Residency())
    plan = Plan(requests[0].lane, [Work(made, 0, 1) for made in requests])
    found = dict(settlement.charge(plan, result.results, result.busy_us, result.own_us))
    assert sum(found.values()) == result.busy_us
    return found


EXPENSIVE = {
    "prompt_draws": sample(1, LENGTH, prompt_draws=64),
    "prompt_top_logprobs": sample(1, LENGTH, prompt_top_logprobs=64),
    "prompt_targets": sample(1, LENGTH, targets=64),
    "samples": sample(1, LENGTH, num_samples=16, top_logprobs=64),
    "logits": forward(1, LENGTH, "ad_1", OutputSpec(logits=True)),
    "top_k": forward(1, LENGTH, "ad_1", OutputSpec(top_k=64)),
    "entropy": forward(1, LENGTH, "ad_1", OutputSpec(entropy=True)),
}


@pytest.mark.parametrize("what", EXPENSIVE)
def test_a_neighbour_pays_what_it_pays_alone(executor: Executor, what: str) -> None:
    """In one process, so that what is compared is measured under the same load."""
    expensive = EXPENSIVE[what]
    modest = sample(2, 8) if isinstance(expensive[1], Sample) else forward(2, 8, "ad_2")
    charges(executor, modest)  # what is made once is made
    alone = statistics.median(charges(executor, modest)[2] for _ in range(ROUNDS))
    beside = statistics.median(charges(executor, expensive, modest)[2] for _ in range(ROUNDS))
    assert beside <= MOST * alone + 200, (what, alone, beside)
