"""What an asample asks for, in the words of `/v1`."""

from tinkerbell import wire
from tinkerbell.api.tinker import messages as m
from tinkerbell.errors import InvalidRequest
from tinkerbell.types import ModelInfo, SamplingParams

_SEED_BITS = (1 << 63) - 1


def request(body: m.Asample, model: ModelInfo) -> wire.Sample:
    """Raises InvalidRequest for what is not served."""
    prompt = _tokens(body.prompt)
    asked = body.sampling_params
    room = model.max_length - len(prompt)
    if asked.max_tokens is None and room < 1:
        raise InvalidRequest(f"The prompt has {len(prompt)} tokens; {model.name} takes at most {model.max_length}.")
    last = body.prompt_logprobs_last_n
    if last is not None and not 1 <= last <= len(prompt):
        raise InvalidRequest(f"prompt_logprobs_last_n is {last}; the prompt has {len(prompt)} tokens.")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        if getattr(body, name):
            raise InvalidRequest(f"{name} is not served.")
    if body.target_prompt_logprobs is not None:
        raise InvalidRequest("target_prompt_logprobs is not served.")
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
    )
    return wire.Sample(prompt=prompt, params=params)


def _tokens(prompt: m.Prompt) -> list[int]:
    tokens: list[int] = []
    for chunk in prompt.chunks:
        if chunk.type != "encoded_text":
            raise InvalidRequest(f"prompt: {chunk.type} is not served; the model reads text only.")
        tokens += chunk.tokens
    if not tokens:
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
    if texts:
        return texts, None
    return (), tuple(each for each in stop if isinstance(each, int))
