"""Protobuf bodies of the tinker protocol: data of a forward_backward, results of it and of a sample.

N: tokens of a datum; P: of a prompt; M: sampled; K: alternatives for a token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zstandard
from google.protobuf.message import DecodeError

from tinkerbell.api import validation
from tinkerbell.api.tinker import wire_pb2 as pb
from tinkerbell.errors import Corrupt, InvalidRequest, TooLarge
from tinkerbell.events import kinds
from tinkerbell.types import Datum, LossSignature, LossSpec, ModelInfo

MEDIA_TYPE = "application/x-protobuf"
TARGETS = "target_tokens"

_DTYPES = {pb.DTYPE_FLOAT32: "<f4", pb.DTYPE_INT64: "<i8", pb.DTYPE_INT32: "<i4"}
NOTHING = -99999.0
"""Logprob of an empty cell."""

_LARGEST = 2**27
"""Numbers in one dense tensor; a sparse one of few bytes may name any shape."""

Array = np.ndarray[Any, np.dtype[Any]]


def decompress(raw: bytes, max_bytes: int) -> bytes:
    """A zstd body. Raises InvalidRequest, TooLarge over `max_bytes`."""
    try:
        data: bytes = zstandard.ZstdDecompressor().stream_reader(raw).read(max_bytes + 1)
    except zstandard.ZstdError as error:
        raise InvalidRequest(f"the body is not zstd: {error}") from error
    if len(data) > max_bytes:
        raise TooLarge(f"The body may have at most {max_bytes} bytes.")
    return data


def forward_backward(raw: bytes) -> pb.ForwardBackwardRequest:
    """Raises InvalidRequest."""
    request = pb.ForwardBackwardRequest()
    try:
        request.ParseFromString(raw)
    except DecodeError as error:
        raise InvalidRequest(f"the body is no ForwardBackwardRequest: {error}") from error
    return request


def loss_spec(request: pb.ForwardBackwardRequest) -> LossSpec:
    """Name and settings. Raises InvalidRequest for a setting that is no number."""
    config = dict(request.loss_fn_config)
    for name, value in request.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise InvalidRequest(f"loss_fn_config: {name!r} must be a number.")
        config[name] = value.number
    return LossSpec(name=request.loss_fn or "cross_entropy", config=config)


def data(request: pb.ForwardBackwardRequest, spec: LossSpec, model: ModelInfo, max_tokens: int) -> list[Datum]:
    """What to train on. Raises InvalidRequest naming the datum, TooLarge over `max_tokens`."""
    signature = validation.loss(spec)
    if not request.data:
        raise InvalidRequest("data is empty.")
    chunks = [_tokens(f"data[{i}].model_input", datum.model_input) for i, datum in enumerate(request.data)]
    num_tokens = sum(map(len, chunks))
    if num_tokens > max_tokens:
        raise TooLarge(
            f"The request has {num_tokens} tokens; a request may have {max_tokens}.",
            num_tokens=num_tokens,
            limit=max_tokens,
        )
    rows = zip(request.data, chunks, strict=True)
    return [_datum(f"data[{i}]", each, tokens, spec.name, signature, model) for i, (each, tokens) in enumerate(rows)]


def _tokens(where: str, chunks: Sequence[pb.Chunk]) -> Array:
    """[N] int32."""
    parts = []
    for chunk in chunks:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise InvalidRequest(f"{where}: {kind} is not served; the model reads text only.")
        parts.append(_numbers(where, chunk.encoded_text.tokens, "<i4"))
    tokens = np.concatenate(parts) if parts else np.empty(0, "<i4")
    if not tokens.size:
        raise InvalidRequest(f"{where} has no tokens.")
    return tokens


def _datum(
    where: str, datum: pb.Datum, tokens: Array, loss_name: str, signature: LossSignature, model: ModelInfo
) -> Datum:
    n = len(tokens)
    if n > model.max_length:
        raise InvalidRequest(f"{where} has {n} tokens; {model.name} takes at most {model.max_length}.")
    arrays = {name: tensor(f"{where}.loss_fn_inputs.{name}", value) for name, value in datum.loss_fn_inputs.items()}
    if TARGETS not in arrays:
        raise InvalidRequest(f"{where}.loss_fn_inputs: {loss_name} needs {TARGETS!r}.")
    targets = _column(f"{where}.loss_fn_inputs.{TARGETS}", arrays.pop(TARGETS), n)
    for name in signature.required:
        if name not in arrays:
            raise InvalidRequest(f"{where}.loss_fn_inputs: {loss_name} needs {name!r}.")
    known = (*signature.required, *signature.optional)
    for name in arrays:
        if name not in known:
            raise InvalidRequest(
                f"{where}.loss_fn_inputs: {loss_name} reads no {name!r}; it reads {', '.join((TARGETS, *known))}."
            )
    return Datum(
        tokens=_token_bytes(f"{where}.model_input", tokens, model),
        targets=_token_bytes(f"{where}.loss_fn_inputs.{TARGETS}", targets, model),
        loss_inputs={
            name: _float_bytes(
                f"{where}.loss_fn_inputs.{name}", _column(f"{where}.loss_fn_inputs.{name}", arrays[name], n)
            )
            for name in sorted(arrays)
        },
    )


def _column(where: str, array: Array, n: int) -> Array:
    """[n] of an array [n] or [n, 1]."""
    if array.ndim == 2 and array.shape == (n, 1):
        array = array[:, 0]
    if array.shape != (n,):
        more = ""
        if array.ndim == 2 and array.shape[0] == n:
            more = " Several targets for a token are not served yet."
        raise InvalidRequest(f"{where} has the shape {list(array.shape)} for {n} tokens.{more}")
    return array


def tensor(where: str, value: pb.Tensor) -> Array:
    """As a dense array in its own shape. Raises InvalidRequest."""
    dtype = _DTYPES.get(value.dtype)
    if dtype is None:
        raise InvalidRequest(f"{where} has the dtype {value.dtype}; float32 (1), int64 (2) and int32 (3) are served.")
    shape = tuple(value.shape)
    if any(side < 0 for side in shape) or np.prod(shape, dtype=np.float64) > _LARGEST:
        raise InvalidRequest(f"{where} has the shape {list(shape)}.")
    if value.WhichOneof("encoding") == "sparse_csr":
        return _dense(where, value.sparse_csr, dtype, shape)
    numbers = _numbers(where, value.dense, dtype)
    if not shape:
        return numbers
    if numbers.size != int(np.prod(shape)):
        raise InvalidRequest(f"{where} has {numbers.size} numbers for the shape {list(shape)}.")
    return numbers.reshape(shape)


def _dense(where: str, csr: pb.SparseCsr, dtype: str, shape: tuple[int, ...]) -> Array:
    values = _numbers(where, csr.values, dtype)
    rows, columns = _numbers(where, csr.crow_indices, "<i8"), _numbers(where, csr.col_indices, "<i8")
    fits = (
        len(shape) == 2
        and len(rows) == shape[0] + 1
        and rows[0] == 0
        and rows[-1] == len(values) == len(columns)
        and bool((np.diff(rows) >= 0).all())
        and bool(((columns >= 0) & (columns < shape[1])).all())
    )
    if not fits:
        raise InvalidRequest(f"{where} is no CSR matrix of the shape {list(shape)}.")
    dense = np.zeros(shape, dtype)
    dense[np.repeat(np.arange(shape[0]), np.diff(rows)), columns] = values
    return dense


def _numbers(where: str, raw: bytes, dtype: str) -> Array:
    if len(raw) % np.dtype(dtype).itemsize:
        raise InvalidRequest(f"{where} has {len(raw)} bytes, which are no whole numbers.")
    return np.frombuffer(raw, dtype)


def _token_bytes(where: str, tokens: Array, model: ModelInfo) -> bytes:
    """[N] int32 of any numbers. Raises InvalidRequest for what is no token of the model."""
    wrong = np.flatnonzero(~((tokens >= 0) & (tokens < model.vocab_size) & (tokens == np.floor(tokens))))
    if wrong.size:
        i = int(wrong[0])
        raise InvalidRequest(
            f"{where}[{i}] is {tokens[i]}; the vocabulary of {model.name} has {model.vocab_size} tokens (0 to"
            f" {model.vocab_size - 1})."
        )
    return tokens.astype("<i4").tobytes()


def _float_bytes(where: str, values: Array) -> bytes:
    """[N] float32. Raises InvalidRequest for what float32 cannot hold."""
    with np.errstate(over="ignore"):
        numbers = values.astype("<f4")
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if wrong.size:
        i = int(wrong[0])
        raise InvalidRequest(f"{where}[{i}] is {values[i]}; it must be a finite float32 number.")
    return numbers.tobytes()


def forward_backward_output(position: int, loss: float, metrics: Mapping[str, float], body: kinds.Body | None) -> bytes:
    """ForwardBackwardOutput. Raises Corrupt."""
    if not isinstance(body, kinds.LogprobsBody):
        raise Corrupt(f"event {position} has no logprobs")
    ends = np.cumsum([0, *map(len, body.logprobs)], dtype="<i8")
    logprobs = pb.BatchedTensor(data=b"".join(body.logprobs), offsets=ends.tobytes(), dtype=pb.DTYPE_FLOAT32)
    record = pb.ArrayRecord(type_tag="ArrayRecord", fields={"logprobs": logprobs}, num_datums=len(body.logprobs))
    # The SDK puts the chunks of one call together by what is behind the colon.
    named = {f"{name.removesuffix('_sum')}:sum": value for name, value in metrics.items()}
    output = pb.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord", loss_fn_outputs=[record], metrics={"loss:sum": loss, **named}
    )
    return output.SerializeToString()


def sample_response(
    position: int, asked: kinds.SampleRequested, request: kinds.Body | None, body: kinds.Body | None
) -> bytes:
    """SampleResponse of what a request with this body asked. Raises Corrupt."""
    if not isinstance(request, kinds.SampleBody) or not isinstance(body, kinds.SamplesBody):
        raise Corrupt(f"event {position} has no samples")
    response = pb.SampleResponse()
    for sequence in body.sequences:
        reason = pb.STOP_REASON_STOP if sequence.stop_reason == "stop" else pb.STOP_REASON_LENGTH
        added = response.sequences.add(stop_reason=reason, tokens=sequence.tokens, logprobs=sequence.logprobs)
        if sequence.top_tokens is not None and sequence.top_logprobs is not None:
            k = asked.params.top_logprobs
            added.topk_sampled_logprobs.CopyFrom(_likeliest(sequence.top_tokens, sequence.top_logprobs, k))
    # The first token is given, nobody predicted it.
    first = asked.num_tokens - asked.prompt_logprobs_last if asked.prompt_logprobs_last is not None else 1
    if body.prompt_logprobs is not None:
        logprobs = np.append(np.float32(np.nan), np.frombuffer(body.prompt_logprobs, "<f4")).astype("<f4")
        logprobs[:first] = np.nan
        response.prompt_logprobs = logprobs.tobytes()
    scores = body.prompt_scores
    if scores is not None and scores.top_tokens is not None and scores.top_logprobs is not None:
        k = asked.params.prompt_top_logprobs
        tokens, tops = np.zeros((asked.num_tokens, k), "<i4"), np.full((asked.num_tokens, k), NOTHING, "<f4")
        tokens[1:], tops[1:] = (
            np.frombuffer(raw, dtype).reshape(-1, k)
            for raw, dtype in ((scores.top_tokens, "<i4"), (scores.top_logprobs, "<f4"))
        )
        tokens[:first], tops[:first] = 0, NOTHING
        response.topk_prompt_logprobs.CopyFrom(_likeliest(tokens.tobytes(), tops.tobytes(), k))
    if scores is not None and scores.target_logprobs is not None and request.prompt_targets is not None:
        targets = np.frombuffer(request.prompt_targets, "<i4").reshape(asked.num_tokens, -1)[1:]
        logprobs = np.frombuffer(scores.target_logprobs, "<f4").reshape(asked.num_tokens, -1)[1:]
        found = _targets_dense if not asked.prompt_targets_sparse else _targets_sparse
        response.target_prompt_logprobs.CopyFrom(found(targets, logprobs))
    return response.SerializeToString()


def _likeliest(tokens: bytes, logprobs: bytes, k: int) -> pb.TopkLogprobs:
    return pb.TopkLogprobs(token_ids=tokens, logprobs=logprobs, k=k, length=len(tokens) // (4 * k))


def _targets_dense(targets: Array, logprobs: Array) -> pb.Tensor:
    """0 where nothing was asked for."""
    cells = np.where(targets >= 0, logprobs, np.float32(0)).astype("<f4")
    return pb.Tensor(dense=cells.tobytes(), dtype=pb.DTYPE_FLOAT32, shape=cells.shape)


def _targets_sparse(targets: Array, logprobs: Array) -> pb.Tensor:
    """The cells that were asked for."""
    rows, columns = np.nonzero(targets >= 0)
    ends = np.append(0, np.cumsum((targets >= 0).sum(axis=1))).astype("<i8")
    csr = pb.SparseCsr(
        values=logprobs[rows, columns].astype("<f4").tobytes(),
        crow_indices=ends.tobytes(),
        col_indices=columns.astype("<i8").tobytes(),
    )
    return pb.Tensor(sparse_csr=csr, dtype=pb.DTYPE_FLOAT32, shape=targets.shape)
