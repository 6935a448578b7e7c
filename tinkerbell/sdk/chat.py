"""From conversations to data: which tokens of a chat template are the assistant's to learn."""

from collections.abc import Sequence
from typing import Literal

from tinkerbell import wire
from tinkerbell.errors import InvalidRequest
from tinkerbell.sdk.data import supervised
from tinkerbell.sdk.tokenizer import Tokenizer, chat_tokens

Message = dict[str, str]

PROBES = ("a", "b")
"""Two contents of a message: what a template writes whatever they are, is the template's."""


def from_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    train_on: Literal["assistant", "last"] = "assistant",
) -> wire.DatumBody:
    """Learn the assistant's messages of a conversation (all, or the last message only) in the model's chat
    format.

    What belongs to a message is found by applying the chat template to the conversation up to it. What ends the turn
    is learned, what the template writes after that is not: the end-of-turn token, or where a template has none the
    token with which the next role begins (behind the last message that of a user; all of the role's words where it
    begins with words). Raises InvalidRequest where the template rewrites earlier turns when later ones are added (then
    no such split exists), or where there is nothing to learn.
    """
    if train_on == "last":
        turns = [len(messages) - 1] if messages and messages[-1]["role"] == "assistant" else []
    else:
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise InvalidRequest("no message of the assistant to learn")
    if turns[0] == 0:
        raise InvalidRequest("the conversation must not begin with the assistant")
    tokens = chat_tokens(tokenizer, messages, prompt=False)
    weights = [0.0] * len(tokens)
    for turn in turns:
        start, stop = _learned(tokenizer, messages, tokens, turn)
        # Behind the last message the next role's tokens were added.
        weights += [0.0] * (len(tokens) - len(weights))
        weights[start:stop] = [1.0] * (stop - start)
    return supervised(tokens, weights=weights)


def _learned(tokenizer: Tokenizer, messages: Sequence[Message], tokens: list[int], turn: int) -> tuple[int, int]:
    """Where the message and the end of its turn begin and stop in `tokens`, to which is added what would end it."""
    before = chat_tokens(tokenizer, messages[:turn])
    until = chat_tokens(tokenizer, messages[: turn + 1], prompt=False)
    closing = _closing(tokenizer, messages, turn, until)
    shared = _num_shared(until, tokens)
    # Some templates write an end behind the last message only.
    only_last = len(until) - shared
    if tokens[: len(before)] != before or shared <= len(before) or only_last > len(closing):
        raise InvalidRequest(
            f"the chat template is not prefix-stable: with message {turn} it writes the earlier ones"
            " differently; encode the conversation yourself and use supervised(tokens, weights=...)"
        )
    closing = closing[: len(closing) - only_last]
    end = _num_ending(tokenizer, closing)
    if end is not None:
        return len(before), shared - len(closing) + end
    following = _next_role(tokenizer, messages, turn, shared)
    tokens[shared : shared + len(following)] = following
    return len(before), shared + len(following)


def _closing(tokenizer: Tokenizer, messages: Sequence[Message], turn: int, until: list[int]) -> list[int]:
    """What the template writes behind the content of the message."""
    found = [
        chat_tokens(tokenizer, [*messages[:turn], {**messages[turn], "content": probe}], prompt=False)
        for probe in PROBES
    ]
    first, second, whole = (tokens[::-1] for tokens in (*found, until))
    count = min(_num_shared(first, second), _num_shared(first, whole))
    return until[len(until) - count :]


def _num_ending(tokenizer: Tokenizer, closing: Sequence[int]) -> int | None:
    """How many of the tokens behind a message end its turn; None where blanks at most are there."""
    ends = [index + 1 for index, token in enumerate(closing) if token == tokenizer.eos_token_id]
    if ends:
        return ends[-1]
    special = [index + 1 for index, token in enumerate(closing) if _is_special(tokenizer, token)]
    if special:
        return special[0]
    return len(closing) if closing and tokenizer.decode(closing).strip() else None


def _next_role(tokenizer: Tokenizer, messages: Sequence[Message], turn: int, start: int) -> list[int]:
    """With what the role behind the message begins, from the token `start` on: one token that is no text, or words."""
    follower = messages[turn + 1] if turn + 1 < len(messages) else {"role": "user"}
    first, second = (
        chat_tokens(tokenizer, [*messages[: turn + 1], {**follower, "content": probe}], prompt=False)[start:]
        for probe in PROBES
    )
    header = first[: _num_shared(first, second)]
    return header[:1] if header and _is_special(tokenizer, header[0]) else header


def _is_special(tokenizer: Tokenizer, token: int) -> bool:
    return not tokenizer.decode([token], skip_special_tokens=True)


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
