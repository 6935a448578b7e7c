"""What the executor is told of a sample that runs in several pieces."""

import asyncio
import struct
from types import SimpleNamespace

from tinkerbell.events import kinds
from tinkerbell.executors.fake import FakeExecutor
from tinkerbell.executors.port import Batch, Sample, SampleDone
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.scheduler.batching import DRAWS_TOGETHER, Plan, Work, cut_draws
from tinkerbell.scheduler.bodies import Bodies
from tinkerbell.scheduler.pending import LANES, PendingRequest
from tinkerbell.scheduler.results import sample_done
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
    assert (second.params.prompt_logprobs, second.params.prompt_top_logprobs, len(second.draws)) == (False, 0, 0)
    assert len(first.draws) == PARAMS.prompt_draws
    assert second.params.top_logprobs == 3, "those of its own samples are wanted"


def test_a_prompts_draws_are_cut_and_come_out_as_if_they_were_not() -> None:
    fake = FakeExecutor(ExecutorOptions())
    prompt = struct.pack("<900i", *(number % 256 for number in range(900)))
    params = SamplingParams(num_samples=2, max_tokens=2, prompt_draws=64, prompt_top_logprobs=2, seed=3)
    event = kinds.SampleRequested(params=params, num_tokens=900)
    request = PendingRequest(5, "t", None, None, event, "sample", LANES["sample"])
    bodies = Bodies(None, 8192)  # type: ignore[arg-type]
    body = kinds.SampleBody(prompt)
    bodies._keep(request, body)
    assert len(request.chunks) == len(cut_draws(899, 64)) == 4
    plan = Plan(request.lane, [Work(request, chunk, 1) for chunk in range(len(request.chunks))])
    units = asyncio.run(units_of(plan, bodies))
    assert all(len(unit.draws) * 899 <= DRAWS_TOGETHER for unit in units if isinstance(unit, Sample))
    request.outcomes = list(fake.run(Batch(id="1", units=units)).results)  # type: ignore[arg-type]
    whole = Sample(request=5, adapter=None, prompt=prompt, params=params, seed=3)
    (expected,) = fake.run(Batch(id="2", units=[whole])).results
    assert isinstance(expected, SampleDone)
    completed, found = sample_done(request, "1", 0)
    assert isinstance(found, kinds.SamplesBody) and isinstance(completed, kinds.SampleCompleted)
    assert (found.sequences, found.prompt_scores) == (expected.sequences, expected.prompt_scores)
