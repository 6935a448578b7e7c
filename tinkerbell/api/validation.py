"""Whether a request makes sense for the served model, and its lists as bytes. Pure.

Checked here is all that can be known without running it, so that a caller learns of a mistake at once and in
the terms of its own request; every error names the datum or field.

N: tokens of a datum; P: tokens of a prompt.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec
import numpy as np

from tinkerbell import wire
from tinkerbell.api.bodies import check_tokens
from tinkerbell.config import Limits
from tinkerbell.errors import InvalidRequest, NotFound, TooLarge, shown
from tinkerbell.events.codec import out_of_limits
from tinkerbell.types import (
    BUILTIN_LOSSES,
    TARGET_PRESETS,
    Datum,
    LoraConfig,
    LossSignature,
    LossSpec,
    ModelInfo,
    OutputSpec,
    SamplingParams,
)

S = TypeVar("S", bound=msgspec.Struct)

MIN_TEMPERATURE = 1e-6
"""Below it logits divided by the temperature leave float32; 0 means greedy."""

_ADAPTER_ID = re.compile(r"ad_[a-z2-7]{20}|se_[a-z2-7]{20}:(train|sample):(0|[1-9][0-9]{0,17})")
"""The second form: made within a session (api/tinker/names.py)."""
_CHECKPOINT_ID = re.compile(r"ck_[a-z2-7]{20}")


def adapter_id(text: str) -> str:
    """`text` if it can be an adapter's id. Raises NotFound in the words used for one that does not exist."""
    if not _ADAPTER_ID.fullmatch(text):
        raise no_adapter(text)
    return text


def checkpoint_id(text: str) -> str:
    """`text` if it can be a checkpoint's id. Raises NotFound in the words used for one that does not
    exist."""
    if not _CHECKPOINT_ID.fullmatch(text):
        raise no_checkpoint(text)
    return text


def no_adapter(text: str) -> NotFound:
    """One text for missing, foreign and removed adapters alike."""
    return NotFound(f"There is no adapter {shown(text)}.")


def no_checkpoint(text: str) -> NotFound:
    """One text for missing and foreign checkpoints alike."""
    return NotFound(f"There is no checkpoint {shown(text)}.")


def within(where: str, value: S, names: Mapping[str, str] | None = None) -> S:
    """`value` if its fields are within the limits that its type states: who builds one in code has not checked them.

    `where`: how the caller calls it; `names`: field -> the caller's word. Raises InvalidRequest that names the field.
    """
    try:
        return msgspec.convert(msgspec.to_builtins(value), type(value))
    except msgspec.ValidationError as error:
        raise out_of_limits(error, where, names) from error


def lora(config: LoraConfig, model: ModelInfo) -> None:
    """Every target is a preset or module name this model has."""
    for target in config.targets:
        if not any(name in model.targets for name in TARGET_PRESETS.get(target, (target,))):
            raise InvalidRequest(
                f"lora.targets: {model.name} has no {shown(target)}; it has {', '.join(model.targets)}"
                f" and the presets {', '.join(TARGET_PRESETS)}."
            )


def num_parameters(config: LoraConfig, model: ModelInfo) -> int:
    """Of an adapter of this shape; 0 where the executor does not say what decides it."""
    words = {word for target in config.targets for word in TARGET_PRESETS.get(target, (target,))}
    return config.rank * sum(model.parameters_per_rank.get(word, 0) for word in words)


def loss(spec: LossSpec) -> LossSignature:
    """The signature of a built-in loss whose settings are all known to it."""
    signature = BUILTIN_LOSSES.get(spec.name)
    if signature is None:
        raise InvalidRequest(f"loss.name: {shown(spec.name)} is none of {', '.join(BUILTIN_LOSSES)}.")
    for name in spec.config:
        if name not in signature.config:
            known = ", ".join(signature.config) or "none"
            raise InvalidRequest(f"loss.config: {spec.name} has no setting {shown(name)}; it has {known}.")
        if not math.isfinite(spec.config[name]):
            raise InvalidRequest(f"loss.config: {shown(name)} is {spec.config[name]}; it must be a finite number.")
    return signature


def data(body: wire.ForwardBackward, model: ModelInfo, limits: Limits) -> list[Datum]:
    """The data as little-endian bytes. Raises InvalidRequest naming the datum, TooLarge over the limits."""
    spec, signature = body.loss, loss(body.loss)
    num_tokens = sum(len(datum.tokens) for datum in body.data)
    check_tokens(num_tokens, limits.max_request_tokens)
    targets(spec.name, signature, num_tokens, body.num_targets, limits.max_output_bytes)
    return [
        _datum(f"data[{i}]", datum, body.num_targets, spec.name, signature, model) for i, datum in enumerate(body.data)
    ]


def targets(loss_name: str, signature: LossSignature, num_tokens: int, num_targets: int, max_bytes: int) -> None:
    """Raises InvalidRequest for several targets of a token where the loss takes one, TooLarge where the logprobs of
    all of them have over `max_bytes`."""
    if num_targets == 1:
        return
    if not signature.several_targets:
        raise InvalidRequest(
            f"{loss_name} takes one target for each token, not {num_targets}; cross_entropy takes more."
        )
    if (num_bytes := 4 * num_tokens * num_targets) > max_bytes:
        raise TooLarge(
            f"The logprobs of {num_targets} targets of {num_tokens} tokens have {num_bytes} bytes; those of a request"
            f" may have {max_bytes}. Send fewer tokens at a time.",
            num_bytes=num_bytes,
            limit=max_bytes,
        )


def _datum(
    where: str, body: wire.DatumBody, num_targets: int, loss_name: str, signature: LossSignature, model: ModelInfo
) -> Datum:
    n = len(body.tokens)
    k = "" if num_targets == 1 else f" times {num_targets}"
    if n > model.max_length:
        raise InvalidRequest(f"{where} has {n} tokens; {model.name} takes at most {model.max_length}.")
    if len(body.targets) != n * num_targets:
        raise InvalidRequest(f"{where} has {n} tokens and {len(body.targets)} targets; it must have as many{k}.")
    for name in signature.required:
        if name not in body.loss_inputs:
            raise InvalidRequest(f"{where}.loss_inputs: {loss_name} needs {shown(name)}.")
    for name, values in body.loss_inputs.items():
        if name not in signature.required and name not in signature.optional:
            known = ", ".join((*signature.required, *signature.optional))
            raise InvalidRequest(f"{where}.loss_inputs: {loss_name} reads no {shown(name)}; it reads {known}.")
        if len(values) != n * num_targets:
            raise InvalidRequest(f"{where}.loss_inputs.{name} has {len(values)} numbers for {n} tokens{k}.")
    return Datum(
        tokens=token_bytes(f"{where}.tokens", body.tokens, model),
        targets=token_bytes(f"{where}.targets", body.targets, model),
        loss_inputs={
            name: _float_bytes(f"{where}.loss_inputs.{name}", values)
            for name, values in sorted(body.loss_inputs.items())
        },
    )


def outputs(spec: OutputSpec, num_tokens: int, model: ModelInfo, max_bytes: int) -> None:
    """Raises InvalidRequest for more tokens than the vocabulary has, TooLarge over `max_bytes` of arrays."""
    if spec.top_k > model.vocab_size:
        raise InvalidRequest(
            f"outputs.top_k is {spec.top_k}; the vocabulary of {model.name} has {model.vocab_size} tokens."
        )
    num_bytes = spec.num_bytes(num_tokens, model.vocab_size)
    if num_bytes > max_bytes:
        raise TooLarge(
            f"The outputs of {num_tokens} tokens would have {num_bytes} bytes; those of a request may have {max_bytes}."
            " Ask for fewer tokens at a time"
            + (f", or for top_k instead of all {model.vocab_size} logits." if spec.logits else "."),
            num_bytes=num_bytes,
            limit=max_bytes,
        )


def token_bytes(where: str, tokens: Sequence[int], model: ModelInfo) -> bytes:
    """[N] int32. Raises InvalidRequest for a token outside the vocabulary."""
    ids = np.asarray(tokens, dtype="<i4")
    outside = np.flatnonzero(ids >= model.vocab_size)
    if outside.size:
        i = int(outside[0])
        raise InvalidRequest(
            f"{where}[{i}] is {tokens[i]}; the vocabulary of {model.name} has {model.vocab_size} tokens (0 to"
            f" {model.vocab_size - 1})."
        )
    return ids.tobytes()


def _float_bytes(where: str, values: Sequence[float]) -> bytes:
    """[N] float32. Raises InvalidRequest for what float32 cannot hold."""
    with np.errstate(over="ignore"):
        numbers = np.asarray(values, dtype="<f4")
    outside = np.flatnonzero(~np.isfinite(numbers))
    if outside.size:
        i = int(outside[0])
        raise InvalidRequest(f"{where}[{i}] is {values[i]}; it must be a finite float32 number.")
    return numbers.tobytes()


def prompt(body: wire.Sample, model: ModelInfo, max_tokens: int) -> bytes:
    """[P] int32. Raises InvalidRequest where prompt and continuation exceed the model, TooLarge over
    `max_tokens`."""
    p, params = len(body.prompt), body.params
    if params.max_tokens > model.room(p):
        raise InvalidRequest(
            f"prompt has {p} tokens and params.max_tokens is {params.max_tokens}: {p + params.max_tokens}"
            f" together; {model.name} takes at most {model.max_length}."
        )
    total = p + params.num_samples * params.max_tokens
    if total > max_tokens:
        raise TooLarge(
            f"The prompt and {params.num_samples} samples of {params.max_tokens} tokens are {total} tokens;"
            f" a request may have {max_tokens}.",
            num_tokens=total,
            limit=max_tokens,
        )
    _sampling(params, model)
    return token_bytes("prompt", body.prompt, model)


def prompt_targets(body: wire.Sample, model: ModelInfo) -> bytes | None:
    """[P, K] int32. Raises InvalidRequest unless there are rows of one length for all of the prompt's tokens, of tokens
    in the vocabulary or -1."""
    rows = body.prompt_targets
    if rows is None:
        return None
    if len(rows) != len(body.prompt):
        raise InvalidRequest(f"prompt_targets has {len(rows)} rows for {len(body.prompt)} prompt tokens.")
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise InvalidRequest(
                f"prompt_targets[{i}] has {len(row)} tokens and prompt_targets[0] {len(rows[0])}; fill up with -1."
            )
    return b"".join(token_bytes(f"prompt_targets[{i}]", row, model) for i, row in enumerate(rows))


def sample_outputs(body: wire.Sample, model: ModelInfo, max_bytes: int) -> None:
    """Raises InvalidRequest for more likeliest tokens than the vocabulary has, TooLarge over `max_bytes` of arrays."""
    params = body.params
    for name, k in (("top_logprobs", params.top_logprobs), ("prompt_top_logprobs", params.prompt_top_logprobs)):
        if k > model.vocab_size:
            raise InvalidRequest(f"params.{name} is {k}; the vocabulary of {model.name} has {model.vocab_size} tokens.")
    num_bytes = params.num_bytes(len(body.prompt), len(body.prompt_targets[0]) if body.prompt_targets else 0)
    if num_bytes > max_bytes:
        raise TooLarge(
            f"What top_logprobs, prompt_top_logprobs, prompt_draws and prompt_targets ask for would have {num_bytes}"
            f" bytes; that of a request may have {max_bytes}. Ask for fewer tokens at a time.",
            num_bytes=num_bytes,
            limit=max_bytes,
        )


def _sampling(params: SamplingParams, model: ModelInfo) -> None:
    within("params", params)
    for i, text in enumerate(params.stop):
        if "\0" in text:
            raise InvalidRequest(f"params.stop[{i}] has a NUL character.")
    for i, token in enumerate(params.stop_tokens or ()):
        if token >= model.vocab_size:
            raise InvalidRequest(
                f"params.stop_tokens[{i}] is {token}; the vocabulary of {model.name} has {model.vocab_size} tokens."
            )
    if 0 < params.temperature < MIN_TEMPERATURE:
        raise InvalidRequest(
            f"params.temperature is {params.temperature}; use 0 for greedy, or at least {MIN_TEMPERATURE}."
        )
