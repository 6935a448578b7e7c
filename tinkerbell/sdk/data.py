"""From tokens or text to the data of forward_backward; plain lists, no tensor library.

The server shifts nothing: position t of a datum holds input token t, and the target is the token after it.
Each helper here takes whole sequences and does that shift; weights say which tokens are learned.
"""

import math
from collections.abc import Iterable, Sequence
from operator import index

from tinkerbell import wire
from tinkerbell.errors import InvalidRequest
from tinkerbell.sdk.tokenizer import Tokenizer


def supervised(
    tokens: Sequence[int], *, prompt_length: int | None = None, weights: Sequence[float] | None = None
) -> wire.DatumBody:
    """A datum for cross_entropy from a sequence of L >= 2 tokens; N = L - 1.

    Learned is every token but the first (which nothing precedes), or every token from `prompt_length` on,
    or each as much as its entry in `weights` ([L]; the first entry is not used).
    """
    length = len(tokens)
    if length < 2:
        raise InvalidRequest(f"a sequence needs at least 2 tokens to predict one from another, not {length}")
    if weights is not None and prompt_length is not None:
        raise InvalidRequest("give prompt_length or weights, not both")
    if weights is None:
        start = 1 if prompt_length is None else prompt_length
        if not 0 <= start < length:
            raise InvalidRequest(f"a prompt of {start} tokens leaves nothing to learn of {length}")
        weights = [float(index >= start) for index in range(length)]
    if len(weights) != length:
        raise InvalidRequest(f"{len(weights)} weights for {length} tokens")
    if not all(map(math.isfinite, weights)):
        raise InvalidRequest("weights must be finite numbers")
    return _datum(tokens, weights=weights)


def from_text(tokenizer: Tokenizer, prompt: str, completion: str, *, end: bool = True) -> wire.DatumBody:
    """Learn to continue `prompt` with `completion`, and (`end`) to stop there.

    The two are encoded apart, so that the prompt is the same tokens when it is sampled from later.
    """
    head = list(tokenizer.encode(prompt))
    tail = list(tokenizer.encode(completion, add_special_tokens=False))
    if end:
        if tokenizer.eos_token_id is None:
            raise InvalidRequest("this tokenizer has no end-of-sequence token; pass end=False")
        tail.append(tokenizer.eos_token_id)
    return supervised(head + tail, prompt_length=len(head))


def policy(
    prompt: Sequence[int],
    sampled: Sequence[int],
    logprobs: Sequence[float],
    advantage: float | Sequence[float],
    *,
    sequence_ratio: bool = False,
) -> wire.DatumBody:
    """A datum for importance_sampling, ppo, cispo or dro from one sample of M tokens; N = len(prompt) + M - 1.

    `logprobs` [M] are those the sampler gave, in nats; `advantage` is one number for all of them, or [M].
    `sequence_ratio`: for gspo, whose mask of the tokens that make its ratio is then 1 at all sampled ones.
    """
    if not prompt or not sampled:
        raise InvalidRequest("prompt and sample need at least one token each")
    advantages = list(advantage) if isinstance(advantage, Iterable) else [float(advantage)] * len(sampled)
    if len(logprobs) != len(sampled) or len(advantages) != len(sampled):
        raise InvalidRequest(
            f"{len(sampled)} sampled tokens, but {len(logprobs)} logprobs and {len(advantages)} advantages"
        )
    nothing = [0.0] * len(prompt)
    is_sampled = nothing + [1.0] * len(sampled)
    mask = {"sequence_ratio_mask": is_sampled} if sequence_ratio else {}
    return _datum(
        [*prompt, *sampled],
        weights=is_sampled,
        logprobs=nothing + list(logprobs),
        advantages=nothing + advantages,
        **mask,
    )


def _datum(tokens: Sequence[int], **loss_inputs: Sequence[float]) -> wire.DatumBody:
    """The shift: what is said of a token stands at the position that predicts it."""
    # index() and float() take the numbers of array libraries as well, which JSON encoders refuse.
    ids = [index(token) for token in tokens]
    return wire.DatumBody(
        tokens=ids[:-1],
        targets=ids[1:],
        loss_inputs={name: [float(value) for value in values[1:]] for name, values in loss_inputs.items()},
    )
