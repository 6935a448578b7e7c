"""What the executor is told of a sample that runs in several pieces."""

import asyncio
from types import SimpleNamespace

from tinkerbell.events import kinds
from tinkerbell.executors.port import Sample
from tinkerbell.scheduler.batching import Plan, Work
from tinkerbell.scheduler.pending import LANES, PendingRequest
from tinkerbell.scheduler.units import units_of
from tinkerbell.types import SamplingParams

PARAMS = SamplingParams(num_samples=4, prompt_logprobs=True, top_logprobs=3, prompt_top_logprobs=2, prompt_draws=4)


def test_a_prompt_is_scored_with_its_first_piece_only() -> None:
    event = kinds.SampleRequested(params=PARAMS, num_tokens=1)
    request = PendingRequest(5, "t", "a", None, event, "sample", LANES["sample"])
    request.measure([], [(0, 2), (2, 4)])
    body = kinds.SampleBody(b"p" * 4, b"t" * 8)

    async def get(_: PendingRequest) -> kinds.SampleBody:
        return body

    plan = Plan(request.lane, [Work(request, 0, 1), Work(request, 1, 1)])
    first, second = asyncio.run(units_of(plan, SimpleNamespace(get=get)))  # type: ignore[arg-type]
    assert isinstance(first, Sample) and isinstance(second, Sample)
    assert (first.params, first.prompt_targets, first.indices) == (PARAMS, b"t" * 8, range(2))
    assert (second.prompt_targets, second.indices) == (None, range(2, 4))
    assert (second.params.prompt_logprobs, second.params.prompt_top_logprobs, second.params.prompt_draws) == (
        False,
        0,
        0,
    )
    assert second.params.top_logprobs == 3, "those of its own samples are wanted"
