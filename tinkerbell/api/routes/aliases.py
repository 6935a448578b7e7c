"""The short paths of the first protocol: the same calls with the adapter in the body."""

from litestar import Router, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from tinkerbell import wire
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.problems import problems
from tinkerbell.api.routes.futures import wait_for
from tinkerbell.api.shares import POLL
from tinkerbell.api.submissions import Submitter

_TAGS = ["aliases"]
_PROBLEMS = problems(404, 409, 413, 415, 429, 503)


@post(
    "/add_lora",
    status_code=202,
    operation_id="alias_add_lora",
    summary="As POST /v1/adapters",
    tags=_TAGS,
    responses=_PROBLEMS,
)
async def add_lora(data: JSONBody[wire.AddLora], submitter: NamedDependency[Submitter]) -> wire.Future:
    """A new adapter."""
    return await submitter.add_lora(data)


@post(
    "/fwdbwd",
    status_code=202,
    operation_id="alias_forward_backward",
    summary="As POST /v1/adapters/{adapter_id}/fwdbwd",
    tags=_TAGS,
    responses=_PROBLEMS,
)
async def forward_backward(
    data: JSONBody[wire.ForwardBackwardFor], submitter: NamedDependency[Submitter]
) -> wire.Future:
    """Loss, logprobs and gradients."""
    return await submitter.forward_backward(data.adapter_id, data)


@post(
    "/optim_step",
    status_code=202,
    operation_id="alias_optim_step",
    summary="As POST /v1/adapters/{adapter_id}/optim_step",
    tags=_TAGS,
    responses=_PROBLEMS,
)
async def optim_step(data: JSONBody[wire.OptimStepFor], submitter: NamedDependency[Submitter]) -> wire.Future:
    """Apply the accumulated gradient."""
    return await submitter.optim_step(data.adapter_id, data)


@post(
    "/sample",
    status_code=202,
    operation_id="alias_sample",
    summary="As POST /v1/adapters/{adapter_id}/sample, or /v1/sample without an adapter",
    tags=_TAGS,
    responses=_PROBLEMS,
)
async def sample(data: JSONBody[wire.SampleFor], submitter: NamedDependency[Submitter]) -> wire.Future:
    """Continue a prompt."""
    return await submitter.sample(data.adapter_id, data)


@post(
    "/retrieve_future",
    status_code=200,
    operation_id="alias_retrieve_future",
    opt=POLL,
    summary="As GET /v1/futures/{future_id}",
    tags=_TAGS,
    responses=problems(404, 413, 415),
)
async def retrieve_future(
    data: JSONBody[wire.RetrieveFuture],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
) -> wire.Future:
    """A future, with its answer if there is one within `wait_s` seconds."""
    return await wait_for(context, principal.tenant, data.future_id, data.wait_s)


router = Router(path="/", route_handlers=[add_lora, forward_backward, optim_step, sample, retrieve_future])
