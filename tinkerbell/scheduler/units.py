"""From a plan to what the executor is told."""

import hashlib

import msgspec

from tinkerbell.errors import Corrupt
from tinkerbell.events import kinds
from tinkerbell.events.kinds import Body, ForwardBackwardBody, PlannedUnit, Recorded, SampleBody
from tinkerbell.executors.port import ForwardBackward, OptimStep, Sample, Unit
from tinkerbell.scheduler.batching import Plan, Work, cut
from tinkerbell.scheduler.bodies import Bodies
from tinkerbell.scheduler.pending import PendingRequest
from tinkerbell.types import OutputSpec


async def units_of(plan: Plan, bodies: Bodies) -> list[Unit]:
    """One unit for each piece of work, in order. Raises Corrupt."""
    return [await _unit(work, bodies) for work in plan.works]


def planned(work: Work) -> PlannedUnit:
    """As the log names it."""
    start, stop = work.request.chunks[work.chunk]
    return PlannedUnit(request=work.request.position, start=start, stop=stop)


def sample_seed(request: PendingRequest) -> int:
    """Key of a sample's random numbers, 0 to 2^63 - 1: the caller's, or one drawn from the request's
    place."""
    assert isinstance(request.event, kinds.SampleRequested)
    return seed_at(request.event, request.adapter or request.tenant, request.position)


def seed_at(event: kinds.SampleRequested, owner: str, position: int) -> int:
    """The same of a request as the log has it; `owner` is its adapter, or its tenant for the base model."""
    if event.params.seed is not None:
        return event.params.seed
    return int.from_bytes(hashlib.sha256(f"{owner}:{position}".encode()).digest()[:8], "little") >> 1


def units_again(recorded: Recorded, body: Body | None) -> list[Unit]:
    """A request of an adapter as it was cut the first time, from the log alone. Raises Corrupt."""
    event, adapter = recorded.event, recorded.adapter
    assert adapter is not None
    match event, body:
        case kinds.OptimStepRequested(), _:
            return [OptimStep(request=recorded.position, adapter=adapter, adam=event.adam)]
        case kinds.ForwardRequested() | kinds.ForwardBackwardRequested(), ForwardBackwardBody():
            chunks = cut([datum.num_tokens for datum in body.data], event.chunk_tokens)
            return [
                ForwardBackward(
                    request=recorded.position,
                    adapter=adapter,
                    data=body.data[start:stop],
                    loss=event.loss,
                    outputs=_outputs(event),
                    backward=isinstance(event, kinds.ForwardBackwardRequested),
                    first=index == 0,
                    last=index == len(chunks) - 1,
                )
                for index, (start, stop) in enumerate(chunks)
            ]
        case kinds.SampleRequested(), SampleBody():
            seed = seed_at(event, adapter, recorded.position)
            return [
                Sample(
                    request=recorded.position,
                    adapter=adapter,
                    prompt=body.prompt,
                    params=event.params,
                    seed=seed,
                    prompt_targets=body.prompt_targets,
                )
            ]
    raise Corrupt(f"event {recorded.position} has no request body")


def _outputs(event: kinds.ForwardRequested | kinds.ForwardBackwardRequested) -> OutputSpec | None:
    return event.outputs if isinstance(event, kinds.ForwardRequested) else None


def _unscored(unit: Sample) -> Sample:
    """The same of a prompt that was scored with the units before, but for its draws."""
    params = msgspec.structs.replace(unit.params, prompt_logprobs=False, prompt_top_logprobs=0)
    return msgspec.structs.replace(unit, params=params, prompt_targets=None)


async def _unit(work: Work, bodies: Bodies) -> Unit:
    request = work.request
    event = request.event
    match event:
        case kinds.OptimStepRequested():
            assert request.adapter is not None
            return OptimStep(request=request.position, adapter=request.adapter, adam=event.adam)
        case kinds.SampleRequested():
            body = await bodies.get(request)
            assert isinstance(body, SampleBody)
            start, stop = request.chunks[work.chunk]
            first, last = request.draws_of(work.chunk)
            unit = Sample(
                request=request.position,
                adapter=request.adapter,
                prompt=body.prompt,
                params=event.params,
                seed=sample_seed(request),
                start=start,
                stop=stop,
                draws_start=first,
                draws_stop=last,
                prompt_targets=body.prompt_targets,
            )
            return unit if work.first else _unscored(unit)
        case kinds.ForwardRequested() | kinds.ForwardBackwardRequested():
            body = await bodies.get(request)
            assert isinstance(body, ForwardBackwardBody) and request.adapter is not None
            start, stop = request.chunks[work.chunk]
            return ForwardBackward(
                request=request.position,
                adapter=request.adapter,
                data=body.data[start:stop],
                loss=event.loss,
                outputs=_outputs(event),
                backward=request.kind == "forward_backward",
                first=work.first,
                last=work.last,
            )
    raise AssertionError(f"{request.kind} is not run in a batch")
