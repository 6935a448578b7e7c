"""What an asample asks for, in the words of `/v1`."""

from itertools import pairwise
from typing import Any

import numpy as np

from tinkerbell import wire
from tinkerbell.api import validation
from tinkerbell.api.tinker import messages as m
from tinkerbell.errors import InvalidRequest, TooLarge, shown
from tinkerbell.types import MAX_TARGETS, ModelInfo, SamplingParams

MAX_TOP = 64

NO_STABLE_REINFORCE = (
    "stable_reinforce is not served, because nobody published what it computes. Train with importance_sampling, ppo,"
    " cispo or gspo; recipes of the cookbook take loss_fn=importance_sampling."
)

_SEED_BITS = (1 << 63) - 1
_ASKED_AS = {"stop_tokens": "stop"}
"""Field of SamplingParams -> as it is called here."""


def request(body: m.Asample, model: ModelInfo, max_bytes: int) -> wire.Sample:
    """Raises InvalidRequest for what is not served, TooLarge for over `max_bytes` of target tokens."""
    if body.record_stability_info:
        # Here, not only when somebody comes to train on what was sampled.
        raise InvalidRequest(f"record_stability_info: {NO_STABLE_REINFORCE}")
    prompt = _tokens(body.prompt)
    asked = body.sampling_params
    room = model.room(len(prompt))
    if asked.max_tokens is None and room < 1:
        raise InvalidRequest(f"The prompt has {len(prompt)} tokens; {model.name} takes at most {model.max_length}.")
    last = body.prompt_logprobs_last_n
    if last is not None and not 1 <= last <= len(prompt):
        raise InvalidRequest(f"prompt_logprobs_last_n is {shown(last)}; the prompt has {len(prompt)} tokens.")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        if not 0 <= getattr(body, name) <= MAX_TOP:
            raise InvalidRequest(f"{name} is {shown(getattr(body, name))}; it may be 0 to {MAX_TOP}.")
    texts, tokens = _stop(asked.stop)
    params = SamplingParams(
        max_tokens=room if asked.max_tokens is None else asked.max_tokens,
        num_samples=body.num_samples,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        seed=None if asked.seed is None else asked.seed & _SEED_BITS,
        stop=texts,
        stop_tokens=tokens,
        prompt_logprobs=bool(body.prompt_logprobs),
        top_logprobs=body.topk_sample_logprobs,
        prompt_top_logprobs=body.topk_prompt_logprobs,
        prompt_draws=body.prompt_alt_tokens_k,
    )
    params = validation.within("sampling_params", params, _ASKED_AS)
    targets = _targets(body.target_prompt_logprobs, len(prompt), max_bytes)
    return wire.Sample(prompt=prompt, params=params, prompt_targets=targets)


def _targets(tensor: m.TensorBody | None, num_tokens: int, max_bytes: int) -> Any:
    """[P, K] rows, -1 where nothing is asked for, of a tensor [P - 1, K] that begins with the second token; None where
    there is none."""
    if tensor is None:
        return None
    where = "target_prompt_logprobs"
    shape = tensor.shape or []
    if len(shape) != 2 or shape[0] != num_tokens - 1 or not 1 <= shape[1] <= MAX_TARGETS:
        raise InvalidRequest(
            f"{where} has the shape {shown(shape)}; for this prompt it is [{num_tokens - 1}, K], K from 1 to"
            f" {MAX_TARGETS}."
        )
    if (num_bytes := 4 * num_tokens * shape[1]) > max_bytes:
        raise TooLarge(
            f"{where} of the shape {shape} is answered with {num_bytes} bytes; a request may ask for {max_bytes}.",
            num_bytes=num_bytes,
            limit=max_bytes,
        )
    rows, columns = tensor.sparse_crow_indices, tensor.sparse_col_indices
    if rows is None or columns is None:
        if len(tensor.data) != shape[0] * shape[1]:
            raise InvalidRequest(f"{where} has {len(tensor.data)} numbers for the shape {shape}.")
        cells = np.reshape(tensor.data, shape)
    else:
        fits = (
            len(rows) == shape[0] + 1
            and rows[0] == 0
            and rows[-1] == len(tensor.data) == len(columns)
            and all(a <= b for a, b in pairwise(rows))
            and all(0 <= column < shape[1] for column in columns)
        )
        if not fits:
            raise InvalidRequest(f"{where} is no CSR matrix of the shape {shape}.")
        cells = np.full(shape, -1.0)
        cells[np.repeat(np.arange(shape[0]), np.diff(rows)), columns] = tensor.data
    if not ((cells >= -1) & (cells < 2**31) & (cells == np.floor(cells))).all():
        raise InvalidRequest(f"{where} has numbers that are no tokens.")
    return [np.full(shape[1], -1, "<i4"), *cells.astype("<i4")]


def _tokens(prompt: m.Prompt) -> Any:
    """[P] int32."""
    parts = [np.empty(0, "<i4")]
    for chunk in prompt.chunks:
        if chunk.type != "encoded_text":
            raise InvalidRequest(f"prompt: {shown(chunk.type)} is not served; the model reads text only.")
        parts.append(np.asarray(chunk.tokens, "<i4"))
    tokens = np.concatenate(parts)
    if not tokens.size:
        raise InvalidRequest("prompt has no tokens.")
    return tokens


def _stop(stop: str | list[str | int] | None) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """(texts, tokens) that end a sample; tokens None: the model's own. An empty list ends it at nothing."""
    if stop is None:
        return (), None
    if isinstance(stop, str):
        return (stop,), None
    if not stop:
        return (), ()
    texts = tuple(each for each in stop if isinstance(each, str))
    tokens = tuple(each for each in stop if isinstance(each, int))
    if texts and tokens:
        raise InvalidRequest("sampling_params.stop: give texts or tokens, not both.")
    return (texts, None) if texts else ((), tokens)
