"""Notices that a stop text has appeared in what a sample's tokens spell."""

from collections.abc import Sequence
from typing import Any

from tinkerbell.errors import InvalidRequest

CONTEXT_TOKENS = 4
"""Tokens decoded in front of new ones: a tokenizer may spell a token differently at the start of a text."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers spell for bytes that are no whole character."""

PENDING_TOKENS = 8
"""So many tokens that spell no whole character are bytes of none, and are taken as they are."""


class StopTexts:
    """Follows one sample token by token."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: Sequence[int]) -> None:
        """`tokenizer`: of transformers. The prompt is context only; a stop text in it does not count."""
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        self._begin = 0
        """First of the tokens that are decoded again."""
        self._spelled = len(self._tokens)
        """Tokens before this one are in `_tail`, or in the prompt."""
        self._tail = ""
        """End of the text so far, one character shorter than the longest stop text."""

    def push(self, token: int) -> bool:
        """Add one token; whether the text now contains a stop text."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._begin : self._spelled])
        after = self._decode(self._tokens[self._begin :])
        text = self._tail + after[len(before) :]
        if any(stop in text for stop in self._stops):
            return True
        # A replacement character at the end may be the first bytes of one that the next token completes.
        if not after.endswith(REPLACEMENT) or len(self._tokens) - self._spelled >= PENDING_TOKENS:
            keep = max(map(len, self._stops)) - 1
            self._tail = text[-keep:] if keep else ""
            self._begin = max(self._begin, len(self._tokens) - CONTEXT_TOKENS)
            self._spelled = len(self._tokens)
        return False

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def load_tokenizer(source: str) -> Any:
    """The model's tokenizer. Raises InvalidRequest where there is none: stop texts then cannot be recognised."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InvalidRequest("this model has no tokenizer, so a stop must be given by stop_tokens") from exc
