"""The Python client: everything a training script imports."""

from tinkerbell.errors import (
    Conflict,
    InvalidRequest,
    MissingPackage,
    NotFound,
    ServerError,
    TinkerbellError,
    TooManyRequests,
    Unauthorized,
    UserError,
)
from tinkerbell.sdk.adapter import Adapter
from tinkerbell.sdk.async_adapter import AsyncAdapter
from tinkerbell.sdk.async_client import AsyncClient
from tinkerbell.sdk.async_future import AsyncFuture
from tinkerbell.sdk.chat import from_chat
from tinkerbell.sdk.client import Client
from tinkerbell.sdk.data import from_text, policy, supervised
from tinkerbell.sdk.errors import RequestFailed, Unreachable
from tinkerbell.sdk.future import Future
from tinkerbell.sdk.retry import RetryPolicy
from tinkerbell.sdk.tokenizer import Tokenizer, chat_tokens
from tinkerbell.wire import DatumBody as Datum
from tinkerbell.wire import ForwardBackwardResult, OptimStepResult, SampleResult, SaveResult

__all__ = [
    "Adapter",
    "AsyncAdapter",
    "AsyncClient",
    "AsyncFuture",
    "Client",
    "Conflict",
    "Datum",
    "ForwardBackwardResult",
    "Future",
    "InvalidRequest",
    "MissingPackage",
    "NotFound",
    "OptimStepResult",
    "RequestFailed",
    "RetryPolicy",
    "SampleResult",
    "SaveResult",
    "ServerError",
    "TinkerbellError",
    "Tokenizer",
    "TooManyRequests",
    "Unauthorized",
    "Unreachable",
    "UserError",
    "chat_tokens",
    "from_chat",
    "from_text",
    "policy",
    "supervised",
]
