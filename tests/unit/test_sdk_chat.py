"""What of a conversation is learned, under chat templates of several styles."""

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinkerbell.sdk import InvalidRequest, chat_tokens, from_chat

SPECIAL = (
    "<s>", "</s>", "<eos>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|end_of_text|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|observation|>", "<|end|>",
    "<|endoftext|>",
)  # fmt: skip

LOOP = "{% for m in messages %}"
NEXT = "{% endfor %}"
CHATML = (
    LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + NEXT
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
LLAMA_3 = (
    "<s>" + LOOP + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>" + NEXT
    + "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)  # fmt: skip
GEMMA = (
    "<s>" + LOOP
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n" + NEXT
    + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)  # fmt: skip
MISTRAL = (
    "<s>" + LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}"
    + NEXT
)  # fmt: skip
NEXT_ROLE = (
    LOOP + "<|{{ m.role }}|>\n{{ m.content }}" + NEXT + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NEXT_ROLE_AFTER_BLANKS = (
    LOOP + "<|{{ m.role }}|>\n{{ m.content }}\n" + NEXT + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WORDS = LOOP + "{{ m.role }}: {{ m.content }}\n\n" + NEXT + "{% if add_generation_prompt %}assistant: {% endif %}"
END_OF_ALL = NEXT_ROLE.replace("{% endif %}", "{% else %}<|endoftext|>{% endif %}")
PHI_3 = (
    LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + NEXT
    + "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)  # fmt: skip

STYLES = {
    "chatml": (CHATML, "<|im_end|>", ["yo<|im_end|>", "ok<|im_end|>"]),
    "chatml whose end of text is another": (CHATML, "<|endoftext|>", ["yo<|im_end|>", "ok<|im_end|>"]),
    "llama 3": (LLAMA_3, "<|eot_id|>", ["yo<|eot_id|>", "ok<|eot_id|>"]),
    "llama 3, its base's tokenizer": (LLAMA_3, "<|end_of_text|>", ["yo<|eot_id|>", "ok<|eot_id|>"]),
    "gemma": (GEMMA, "<eos>", ["yo<end_of_turn>", "ok<end_of_turn>"]),
    "mistral": (MISTRAL, "</s>", [" yo</s>", " ok</s>"]),
    "the next role ends the turn": (NEXT_ROLE, "<|endoftext|>", ["yo<|user|>", "ok<|user|>"]),
    "and blanks are before it": (NEXT_ROLE_AFTER_BLANKS, "<|endoftext|>", ["yo\n<|user|>", "ok\n<|user|>"]),
    "roles are words": (WORDS, "<|endoftext|>", ["yo\n\nuser: ", "ok\n\nuser: "]),
    "an end behind the last message only": (END_OF_ALL, "<|endoftext|>", ["yo<|user|>", "ok<|endoftext|>"]),
    "phi 3": (PHI_3, "<|end|>", ["yo<|end|>", "ok<|end|>"]),
}

TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "ok"},
]


def tokenizer_of(template: str, end: str) -> Any:
    """A tokenizer of bytes with these special tokens."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(letters, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, chat_template=template)


def learned(tokenizer: Any, datum: Any) -> list[str]:
    """What is learned, piece by piece."""
    pieces: list[list[int]] = [[]]
    for token, weight in zip(datum.targets, datum.loss_inputs["weights"], strict=True):
        if weight:
            pieces[-1].append(token)
        elif pieces[-1]:
            pieces.append([])
    return [tokenizer.decode(piece) for piece in pieces if piece]


@pytest.mark.parametrize("style", STYLES)
def test_the_end_of_each_turn_is_learned(style: str) -> None:
    template, end, expected = STYLES[style]
    tokenizer = tokenizer_of(template, end)
    assert learned(tokenizer, from_chat(tokenizer, TALK)) == expected
    assert learned(tokenizer, from_chat(tokenizer, TALK[:2])) == [expected[-1].replace("ok", "yo")]
    assert learned(tokenizer, from_chat(tokenizer, TALK, train_on="last")) == expected[-1:]


@pytest.mark.parametrize("style", STYLES)
def test_the_tokens_are_those_of_the_conversation(style: str) -> None:
    """What is read before each answer is what is read when it is sampled."""
    template, end, _ = STYLES[style]
    tokenizer = tokenizer_of(template, end)
    datum = from_chat(tokenizer, TALK)
    tokens = [datum.tokens[0], *datum.targets]
    whole = chat_tokens(tokenizer, TALK, prompt=False)
    assert tokens[: len(whole)] == whole
    for turn in (1, 3):
        before = tokenizer.apply_chat_template(
            TALK[:turn], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert tokens[: len(before)] == before
        assert datum.loss_inputs["weights"][len(before) - 1] == 1.0


def test_the_role_that_follows_is_the_one_that_ends_the_turn() -> None:
    tokenizer = tokenizer_of(NEXT_ROLE, "<|endoftext|>")
    talk = [TALK[0], TALK[1], {"role": "observation", "content": "42"}, TALK[3]]
    assert learned(tokenizer, from_chat(tokenizer, talk)) == ["yo<|observation|>", "ok<|user|>"]


def test_a_template_that_rewrites_history_is_refused() -> None:
    forgetful = LOOP + "<|{{ m.role }}|>{{ m.content if loop.last or m.role == 'user' }}" + NEXT
    tokenizer = tokenizer_of(forgetful + "{% if add_generation_prompt %}<|assistant|>{% endif %}", "<eos>")
    with pytest.raises(InvalidRequest, match="prefix-stable"):
        from_chat(tokenizer, TALK)
