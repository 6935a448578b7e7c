"""Notices that a stop text has appeared in what a sample's tokens spell."""

import copy
from collections.abc import Sequence
from typing import Any, Self

from tinkerbell.errors import InvalidRequest

CONTEXT_TOKENS = 8
"""Tokens decoded in front of new ones, at least: a tokenizer may spell a token differently at the start of a text."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers spell for bytes that are no whole character."""


class StopTexts:
    """Follows one sample token by token, and finds a stop text as soon as decoding all its tokens would.

    Only the last tokens are decoded again, from a cut on: a place where the text before it did not end in the bytes of
    half a character. Such a text stays as it is, but where a tokenizer spells a run of bytes all together: then bytes
    of no character, behind the cut, turn the whole run into replacement characters. No stop text reaches over those,
    unless it has some itself; for one that has, everything is decoded each time.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: Sequence[int]) -> None:
        """`tokenizer`: of transformers. The prompt is context only; a stop text in it does not count."""
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._keep = max(map(len, self._stops)) - 1
        self._may_cut = not any(REPLACEMENT in stop for stop in self._stops)
        self._tokens = self._context(prompt)
        """From the first that is decoded again."""
        self._spelled = self._decode(self._tokens)
        """By the tokens whose text is in `_tail`, or in the prompt."""
        self._cut = None if self._spelled.endswith(REPLACEMENT) else len(self._tokens)
        """A place in `_tokens` from which they may be decoded, once enough are behind it."""
        self._tail = ""
        """End of the text so far, one character shorter than the longest stop text."""

    def fork(self) -> Self:
        """Another sample that has come as far."""
        other = copy.copy(self)
        other._tokens = [*self._tokens]
        return other

    def push(self, token: int) -> bool:
        """Add one token; whether the text now contains a stop text."""
        self._tokens.append(token)
        spelled = self._decode(self._tokens)
        text = self._tail + spelled[_num_shared(self._spelled, spelled) :]
        if any(stop in text for stop in self._stops):
            return True
        if self._may_cut and not spelled.endswith(REPLACEMENT):
            self._tail = text[-self._keep :] if self._keep else ""
            self._spelled = spelled
            self._advance()
        return False

    def _advance(self) -> None:
        """Decode less from now on, where that spells the same: the end of all there is can be cut again."""
        end = len(self._tokens)
        if self._cut is None:
            self._cut = end
        if end - self._cut < CONTEXT_TOKENS:
            return
        spelled = self._decode(self._tokens[self._cut :])
        if _is_end(spelled, self._spelled):
            self._tokens, self._spelled = self._tokens[self._cut :], spelled
        self._cut = len(self._tokens)

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The end of the prompt, from a place where it can be cut."""
        whole = self._decode(list(prompt))
        length = CONTEXT_TOKENS
        while self._may_cut and length < len(prompt):
            context = list(prompt[-length:])
            if _is_end(self._decode(context), whole):
                return context
            length *= 2
        return list(prompt)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _num_shared(before: str, after: str) -> int:
    """Characters that both begin with."""
    if after.startswith(before):
        return len(before)
    pairs = zip(before, after, strict=False)
    return next((i for i, (old, new) in enumerate(pairs) if old != new), len(after))


def _is_end(part: str, whole: str) -> bool:
    """Whether the tokens of `part` are cut off well from those of `whole`. Empty text says nothing: the start of a text
    may lose a space, and it must be that of `part`."""
    return bool(part) and not part.startswith(REPLACEMENT) and whole.endswith(part)


def load_tokenizer(source: str) -> Any:
    """The model's tokenizer. Raises InvalidRequest where there is none: stop texts then cannot be recognised."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InvalidRequest("this model has no tokenizer, so a stop must be given by stop_tokens") from exc
