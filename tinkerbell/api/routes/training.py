"""Training: forward, forward and backward, optimizer steps."""

from litestar import Router, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from tinkerbell import wire
from tinkerbell.api.problems import problems
from tinkerbell.api.submissions import Submitter

_TAGS = ["training"]
_PROBLEMS = problems(404, 409, 413, 415, 429, 503)


@post(
    "/adapters/{adapter_id:str}/forward",
    status_code=202,
    operation_id="forward",
    summary="Loss and logprobs without gradients",
    tags=_TAGS,
    responses=_PROBLEMS,
)
async def forward(
    adapter_id: FromPath[str], data: JSONBody[wire.Forward], submitter: NamedDependency[Submitter]
) -> wire.Future:
    """The result has the loss summed over tokens, the logprob of every target, and what `outputs` asks for."""
    return await submitter.forward(adapter_id, data)


@post(
    "/adapters/{adapter_id:str}/fwdbwd",
    status_code=202,
    operation_id="forward_backward",
    summary="Loss, logprobs and gradients",
    tags=_TAGS,
    responses=_PROBLEMS,
)
async def forward_backward(
    adapter_id: FromPath[str], data: JSONBody[wire.ForwardBackward], submitter: NamedDependency[Submitter]
) -> wire.Future:
    """Gradients are added to the adapter's until its next optim_step. Send the optim_step without waiting for
    this."""
    return await submitter.forward_backward(adapter_id, data)


@post(
    "/adapters/{adapter_id:str}/optim_step",
    status_code=202,
    operation_id="optim_step",
    summary="Apply the accumulated gradient",
    tags=_TAGS,
    responses=_PROBLEMS,
)
async def optim_step(
    adapter_id: FromPath[str], data: JSONBody[wire.OptimStep], submitter: NamedDependency[Submitter]
) -> wire.Future:
    """One AdamW step with this request's hyper-parameters; the gradient is cleared."""
    return await submitter.optim_step(adapter_id, data)


router = Router(path="/", route_handlers=[forward, forward_backward, optim_step])
