"""One token a byte, for the fake executor, whose model has 256 tokens and no tokenizer of its own."""

from collections.abc import Sequence
from typing import Any

END = 0


class ByteTokenizer:
    """Does what the demo needs of a tokenizer. Text is ASCII; token 0 ends it, and ends a turn."""

    eos_token_id: int | None = END

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """UTF-8 bytes; there are no special tokens to add."""
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """What can be printed of the bytes."""
        kept = [token for token in token_ids if not (skip_special_tokens and token == END)]
        return "".join(chr(token) if 32 <= token < 127 else "." for token in kept)

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
    ) -> Any:
        """`<role>: <content>` and token 0, one turn after another."""
        ids: list[int] = []
        for message in conversation:
            ids += [*self.encode(f"{message['role']}: {message['content']}"), END]
        return [*ids, *self.encode("assistant: ")] if add_generation_prompt else ids
