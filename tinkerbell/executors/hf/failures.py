"""What a unit's answer is when it could not be done."""

import torch

from tinkerbell.errors import TinkerbellError, UserError
from tinkerbell.executors.port import UnitFailed


class NonFinite(UserError):
    """A loss or gradient is not a finite number."""

    slug = "non-finite"


class NoGradients(UserError):
    """There is no accumulated gradient to apply."""

    slug = "no-gradients"


def failed(request: int, exc: BaseException) -> UnitFailed:
    """The answer for an exception; what is not ours is described by its class only, the log has the rest."""
    if isinstance(exc, TinkerbellError):
        return UnitFailed(request=request, category=exc.category, code=exc.slug, message=exc.detail)
    if out_of_memory(exc):
        message = "the executor ran out of memory on this request"
        return UnitFailed(request=request, category="server", code="out-of-memory", message=message)
    message = f"the executor failed on this request ({type(exc).__name__})"
    return UnitFailed(request=request, category="server", code="internal", message=message)


def out_of_memory(exc: BaseException) -> bool:
    """Whether memory ran out; on CPU torch says so only in the text of a RuntimeError."""
    if isinstance(exc, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(exc, RuntimeError) and any(
        text in str(exc) for text in ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")
    )
