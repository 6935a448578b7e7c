"""The served model's tokenizer. Training needs token ids only, so this is a convenience, not a dependency."""

from collections.abc import Sequence
from typing import Any, Protocol

from tinkerbell.errors import InvalidRequest, MissingPackage, NotFound
from tinkerbell.types import ModelInfo


class Tokenizer(Protocol):
    """What this package uses of a HuggingFace tokenizer; any object with these will do."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Token ids to text."""
        ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
    ) -> Any:
        """Messages to token ids."""
        ...


def load_tokenizer(models: Sequence[ModelInfo]) -> Tokenizer:
    """The tokenizer of the one served model.

    Raises MissingPackage without transformers, NotFound where the model's tokenizer cannot be had on this
    machine.
    """
    if not models:
        raise NotFound("the server serves no model yet")
    source = models[0].tokenizer
    if not source:
        raise NotFound(f"the model {models[0].name} has no tokenizer; send token ids")
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as exc:
        raise MissingPackage(f"tokenizer() needs transformers: pip install transformers ({exc})") from exc
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as exc:
        raise NotFound(
            f"the tokenizer {source!r} cannot be loaded on this machine ({exc});"
            " with a server elsewhere, load the model's tokenizer yourself and send token ids"
        ) from exc
    return tokenizer


def chat_tokens(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], *, prompt: bool = True) -> list[int]:
    """Token ids of a conversation in the model's chat format, by default up to where its answer begins."""
    if not messages:
        raise InvalidRequest("a conversation needs at least one message")
    ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=prompt, tokenize=True, return_dict=False)
    return [int(token) for token in ids]
