"""Sampling from an adapter or from the base model."""

from litestar import Router, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from tinkerbell import wire
from tinkerbell.api.problems import problems
from tinkerbell.api.submissions import Submitter

_TAGS = ["sampling"]


@post(
    "/adapters/{adapter_id:str}/sample",
    status_code=202,
    operation_id="sample",
    summary="Continue a prompt with an adapter",
    tags=_TAGS,
    responses=problems(404, 409, 413, 415, 429, 503),
)
async def sample(
    adapter_id: FromPath[str], data: JSONBody[wire.Sample], submitter: NamedDependency[Submitter]
) -> wire.Future:
    """With the weights the adapter has at this place among its requests."""
    return await submitter.sample(adapter_id, data)


@post(
    "/sample",
    status_code=202,
    operation_id="sample_base_model",
    summary="Continue a prompt with the base model",
    tags=_TAGS,
    responses=problems(409, 413, 415, 429, 503),
)
async def sample_base_model(data: JSONBody[wire.Sample], submitter: NamedDependency[Submitter]) -> wire.Future:
    """No adapter takes part."""
    return await submitter.sample(None, data)


router = Router(path="/", route_handlers=[sample, sample_base_model])
