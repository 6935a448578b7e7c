"""Protobuf bodies of the tinker protocol: data of a forward_backward, results of it and of a sample.

N: tokens of a datum; P: of a prompt; M: sampled; K: targets of a token, or alternatives for it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinkerbell.api import validation
from tinkerbell.api.bodies import check_tokens
from tinkerbell.api.tinker import wire_pb2 as pb
from tinkerbell.api.tinker.sampling import NO_STABLE_REINFORCE
from tinkerbell.config import Limits
from tinkerbell.errors import Corrupt, InvalidRequest, shown
from tinkerbell.events import kinds
from tinkerbell.types import MAX_TARGETS, Datum, LossSignature, LossSpec, ModelInfo

MEDIA_TYPE = "application/x-protobuf"
TARGETS = "target_tokens"

_DTYPES = {pb.DTYPE_FLOAT32: "<f4", pb.DTYPE_INT64: "<i8", pb.DTYPE_INT32: "<i4"}
_LOSS_AS = {"name": "loss_fn", "config": "loss_fn_config"}
"""Field of LossSpec -> as it is called here."""
NOTHING = -99999.0
"""Logprob of an empty cell."""

Array = np.ndarray[Any, np.dtype[Any]]


def loss_spec(request: pb.ForwardBackwardRequest) -> LossSpec:
    """Name and settings. Raises InvalidRequest for a setting that is no number, and for what is not served."""
    if request.loss_fn == "stable_reinforce":
        raise InvalidRequest(f"loss_fn: {NO_STABLE_REINFORCE}")
    config = dict(request.loss_fn_config)
    for name, value in request.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise InvalidRequest(f"loss_fn_config: {shown(name)} must be a number.")
        config[name] = value.number
    return validation.within("", LossSpec(name=request.loss_fn or "cross_entropy", config=config), _LOSS_AS)


def data(
    request: pb.ForwardBackwardRequest, spec: LossSpec, model: ModelInfo, limits: Limits
) -> tuple[list[Datum], int]:
    """What to train on, and K. Raises InvalidRequest naming the datum, TooLarge over the limits."""
    signature, max_tokens = validation.loss(spec), limits.max_request_tokens
    if not request.data:
        raise InvalidRequest("data is empty.")
    chunks = [_tokens(f"data[{i}].model_input", datum.model_input) for i, datum in enumerate(request.data)]
    num_tokens = sum(map(len, chunks))
    check_tokens(num_tokens, max_tokens)
    num_targets = _num_targets(request)
    validation.targets(spec.name, signature, num_tokens, num_targets, limits.max_output_bytes)
    rows = zip(request.data, chunks, strict=True)
    made = [
        _datum(f"data[{i}]", datum, tokens, num_targets, spec.name, signature, model)
        for i, (datum, tokens) in enumerate(rows)
    ]
    return made, num_targets


def _num_targets(request: pb.ForwardBackwardRequest) -> int:
    """K of the first datum: its target_tokens are [N] or [N, K]. Raises InvalidRequest."""
    shape = list(request.data[0].loss_fn_inputs[TARGETS].shape) if TARGETS in request.data[0].loss_fn_inputs else []
    if len(shape) < 2:
        return 1
    if not 1 <= shape[1] <= MAX_TARGETS:
        raise InvalidRequest(f"data[0].loss_fn_inputs.{TARGETS} has the shape {shown(shape)}; K is 1 to {MAX_TARGETS}.")
    return int(shape[1])


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
    where: str,
    datum: pb.Datum,
    tokens: Array,
    num_targets: int,
    loss_name: str,
    signature: LossSignature,
    model: ModelInfo,
) -> Datum:
    n = len(tokens)
    if n > model.max_length:
        raise InvalidRequest(f"{where} has {n} tokens; {model.name} takes at most {model.max_length}.")
    given = datum.loss_fn_inputs
    known = (TARGETS, *signature.required, *signature.optional)
    for name in (TARGETS, *signature.required):
        if name not in given:
            raise InvalidRequest(f"{where}.loss_fn_inputs: {loss_name} needs {shown(name)}.")
    for name in given:
        if name not in known:
            raise InvalidRequest(
                f"{where}.loss_fn_inputs: {loss_name} reads no {shown(name)}; it reads {', '.join(known)}."
            )
    arrays = {name: tensor(f"{where}.loss_fn_inputs.{name}", given[name], n, num_targets) for name in sorted(given)}
    return Datum(
        tokens=_token_bytes(f"{where}.model_input", tokens, model),
        targets=_token_bytes(f"{where}.loss_fn_inputs.{TARGETS}", arrays.pop(TARGETS), model),
        loss_inputs={name: _float_bytes(f"{where}.loss_fn_inputs.{name}", array) for name, array in arrays.items()},
    )


def tensor(where: str, value: pb.Tensor, n: int, k: int) -> Array:
    """[n k] of a tensor of the shape [n, k], or [n] where k is 1; dense ones may leave that to be guessed. Raises
    InvalidRequest."""
    dtype = _DTYPES.get(value.dtype)
    if dtype is None:
        raise InvalidRequest(f"{where} has the dtype {value.dtype}; float32 (1), int64 (2) and int32 (3) are served.")
    shape = list(value.shape)
    if shape not in ([n, k], [n] if k == 1 else None, [] if k == 1 else None):
        wanted = f"[{n}]" if k == 1 else f"[{n}, {k}], since data[0] has {k} {TARGETS} for a token"
        raise InvalidRequest(f"{where} has the shape {shown(shape)}; for {n} tokens it is {wanted}.")
    if value.WhichOneof("encoding") == "sparse_csr":
        return _dense(where, value.sparse_csr, dtype, n, k)
    numbers = _numbers(where, value.dense, dtype)
    if numbers.size != n * k:
        raise InvalidRequest(f"{where} has {numbers.size} numbers for the shape {shown(shape or [n])}.")
    return numbers


def _dense(where: str, csr: pb.SparseCsr, dtype: str, n: int, k: int) -> Array:
    values = _numbers(where, csr.values, dtype)
    rows, columns = _numbers(where, csr.crow_indices, "<i8"), _numbers(where, csr.col_indices, "<i8")
    fits = (
        len(rows) == n + 1
        and rows[0] == 0
        and rows[-1] == len(values) == len(columns)
        and bool((np.diff(rows) >= 0).all())
        and bool(((columns >= 0) & (columns < k)).all())
    )
    if not fits:
        raise InvalidRequest(f"{where} is no CSR matrix of the shape {[n, k]}.")
    dense = np.zeros((n, k), dtype)
    dense[np.repeat(np.arange(n), np.diff(rows)), columns] = values
    return dense.reshape(-1)


def _numbers(where: str, raw: bytes, dtype: str) -> Array:
    if len(raw) % np.dtype(dtype).itemsize:
        raise InvalidRequest(f"{where} has {len(raw)} bytes, which are no whole numbers.")
    return np.frombuffer(raw, dtype)


def _token_bytes(where: str, tokens: Array, model: ModelInfo) -> bytes:
    """[...] int32 of any numbers. Raises InvalidRequest for what is no token of the model."""
    wrong = np.flatnonzero(~((tokens >= 0) & (tokens < model.vocab_size) & (tokens == np.floor(tokens))))
    if wrong.size:
        i = int(wrong[0])
        raise InvalidRequest(
            f"{where}[{i}] is {tokens[i]}; the vocabulary of {model.name} has {model.vocab_size} tokens (0 to"
            f" {model.vocab_size - 1})."
        )
    return tokens.astype("<i4").tobytes()


def _float_bytes(where: str, values: Array) -> bytes:
    """[...] float32. Raises InvalidRequest for what float32 cannot hold."""
    with np.errstate(over="ignore"):
        numbers = values.astype("<f4")
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if wrong.size:
        i = int(wrong[0])
        raise InvalidRequest(f"{where}[{i}] is {values[i]}; it must be a finite float32 number.")
    return numbers.tobytes()


def forward_backward_output(
    position: int, done: kinds.ForwardCompleted | kinds.ForwardBackwardCompleted, body: kinds.Body | None
) -> bytes:
    """ForwardBackwardOutput. Raises Corrupt."""
    if not isinstance(body, kinds.LogprobsBody):
        raise Corrupt(f"event {position} has no logprobs")
    ends = np.cumsum([0, *map(len, body.logprobs)], dtype="<i8")
    logprobs = pb.BatchedTensor(
        data=b"".join(body.logprobs),
        offsets=ends.tobytes(),
        dtype=pb.DTYPE_FLOAT32,
        trailing_shape=[done.num_targets] if done.num_targets > 1 else [],
    )
    record = pb.ArrayRecord(type_tag="ArrayRecord", fields={"logprobs": logprobs}, num_datums=len(body.logprobs))
    # The SDK puts the chunks of one call together by what is behind the colon.
    named = {f"{name.removesuffix('_sum')}:sum": value for name, value in done.metrics.items()}
    output = pb.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord", loss_fn_outputs=[record], metrics={"loss:sum": done.loss, **named}
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
    if scores is not None and scores.drawn_tokens is not None and scores.drawn_logprobs is not None:
        shape = (asked.num_tokens - 1, asked.params.prompt_draws)
        drawn = np.frombuffer(scores.drawn_tokens, "<i4").astype("<i8")
        response.prompt_alt_tokens.tokens.CopyFrom(pb.Tensor(dense=drawn.tobytes(), dtype=pb.DTYPE_INT64, shape=shape))
        response.prompt_alt_tokens.logprobs.CopyFrom(
            pb.Tensor(dense=scores.drawn_logprobs, dtype=pb.DTYPE_FLOAT32, shape=shape)
        )
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
