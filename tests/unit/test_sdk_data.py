"""The shift by one, the masks, and the chat template's turns."""

from collections.abc import Sequence
from typing import Any

import pytest

from tinkerbell.sdk import InvalidRequest, from_chat, from_text, policy, supervised

END = 2


class Letters:
    """A tokenizer of one token a character, with a chat template of its own: `u<text>E` and `a<text>E\\n`."""

    eos_token_id: int | None = END

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return ([1] if add_special_tokens else []) + [ord(letter) for letter in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, token_ids))

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
    ) -> Any:
        assert tokenize
        assert not return_dict
        ids: list[int] = []
        for message in conversation:
            ids += [
                ord(message["role"][0]),
                *self.encode(message["content"], add_special_tokens=False),
                END,
                10,
            ]
        return [*ids, ord("a")] if add_generation_prompt else ids


class Forgetful(Letters):
    """Its template drops what the assistant said before the last turn, as templates of thinking models do."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        kept = [
            message if index == len(conversation) - 1 or message["role"] == "user" else {**message, "content": ""}
            for index, message in enumerate(conversation)
        ]
        return super().apply_chat_template(kept, **options)


def say(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def learned(datum: Any) -> str:
    weights = datum.loss_inputs["weights"]
    return "".join(chr(token) for token, weight in zip(datum.targets, weights, strict=True) if weight)


def test_targets_are_the_tokens_one_further() -> None:
    datum = supervised([5, 6, 7])
    assert (datum.tokens, datum.targets, datum.loss_inputs) == ([5, 6], [6, 7], {"weights": [1.0, 1.0]})


def test_a_prompt_is_read_and_not_learned() -> None:
    datum = supervised([5, 6, 7, 8], prompt_length=2)
    assert datum.targets == [6, 7, 8]
    assert datum.loss_inputs["weights"] == [0.0, 1.0, 1.0]


def test_weights_belong_to_the_token_that_is_predicted() -> None:
    assert supervised([5, 6, 7], weights=[9.0, 0.25, 0.5]).loss_inputs["weights"] == [0.25, 0.5]


@pytest.mark.parametrize(
    "settings",
    [{"prompt_length": 3}, {"prompt_length": -1}, {"weights": [1.0]}, {"weights": [1.0, float("inf"), 1.0]},
     {"prompt_length": 1, "weights": [1.0, 1.0, 1.0]}],
)  # fmt: skip
def test_what_cannot_be_learned_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        supervised([5, 6, 7], **settings)


def test_one_token_is_no_sequence() -> None:
    with pytest.raises(InvalidRequest):
        supervised([5])


def test_text_keeps_prompt_and_completion_apart() -> None:
    datum = from_text(Letters(), "ab", "cd")
    assert [*datum.tokens, datum.targets[-1]] == [1, ord("a"), ord("b"), ord("c"), ord("d"), END]
    assert learned(datum) == "cd" + chr(END)
    assert learned(from_text(Letters(), "ab", "cd", end=False)) == "cd"


def test_text_cannot_end_without_an_end_token() -> None:
    tokenizer = Letters()
    tokenizer.eos_token_id = None
    with pytest.raises(InvalidRequest, match="end=False"):
        from_text(tokenizer, "a", "b")


def test_all_turns_of_the_assistant_are_learned_with_their_end_token() -> None:
    datum = from_chat(Letters(), say("hi", "yo", "more", "ok"))
    assert learned(datum) == f"yo{chr(END)}ok{chr(END)}"


def test_the_last_turn_alone() -> None:
    assert learned(from_chat(Letters(), say("hi", "yo", "more", "ok"), train_on="last")) == f"ok{chr(END)}"


@pytest.mark.parametrize("texts", [(), ("hi",), ("hi", "yo", "more")])
def test_a_conversation_without_an_answer_to_learn(texts: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest):
        from_chat(Letters(), say(*texts), train_on="last")


def test_the_assistant_cannot_begin() -> None:
    with pytest.raises(InvalidRequest, match="begin"):
        from_chat(Letters(), say("", "yo")[1:])


def test_a_template_that_rewrites_history_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prefix-stable"):
        from_chat(Forgetful(), say("hi", "yo", "more", "ok"))
    assert learned(from_chat(Forgetful(), say("hi", "yo"))) == f"yo{chr(END)}"


def test_a_sample_becomes_its_policy_datum() -> None:
    datum = policy([5, 6, 7], [8, 9], [-0.5, -0.25], 2.0)
    assert datum.tokens == [5, 6, 7, 8]
    assert datum.targets == [6, 7, 8, 9]
    assert datum.loss_inputs == {
        "weights": [0.0, 0.0, 1.0, 1.0],
        "logprobs": [0.0, 0.0, -0.5, -0.25],
        "advantages": [0.0, 0.0, 2.0, 2.0],
    }
    assert policy([5], [8, 9], [0, 0], [1, -1]).loss_inputs["advantages"] == [1.0, -1.0]
    whole = policy([5, 6, 7], [8, 9], [-0.5, -0.25], 2.0, sequence_ratio=True)
    assert whole.loss_inputs == datum.loss_inputs | {"sequence_ratio_mask": [0.0, 0.0, 1.0, 1.0]}


def test_numbers_of_a_sample_must_be_as_many_as_its_tokens() -> None:
    with pytest.raises(InvalidRequest, match="2 sampled tokens, but 1 logprobs"):
        policy([5], [8, 9], [-0.5], 1.0)
    with pytest.raises(InvalidRequest):
        policy([], [8], [-0.5], 1.0)
