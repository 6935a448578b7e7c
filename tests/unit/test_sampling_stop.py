"""Stop texts, on tokenizers that split characters and words."""

import pytest

from tinkerbell.errors import InvalidRequest
from tinkerbell.executors.hf.stop import StopTexts, load_tokenizer


class Bytes:
    """A tokenizer of bytes: a character may need several tokens."""

    def decode(self, tokens: list[int], **settings: bool) -> str:
        return bytes(tokens).decode("utf-8", "replace")


class Words:
    """A tokenizer whose words lose their leading space at the start of a text, as sentencepiece's do."""

    def decode(self, tokens: list[int], **settings: bool) -> str:
        return "".join(f" w{token}" for token in tokens).removeprefix(" ")


def first_stop(text: str, *stops: str, prompt: bytes = b"p") -> int | None:
    """How many of the text's bytes are taken before a stop is noticed."""
    watch = StopTexts(Bytes(), stops, list(prompt))
    for count, token in enumerate(text.encode(), 1):
        if watch.push(token):
            return count
    return None


def test_the_token_that_completes_the_stop_is_the_last() -> None:
    assert first_stop("abcdef", "cd") == 4
    assert first_stop("abcdef", "f") == 6
    assert first_stop("abcdef", "x") is None
    assert first_stop("abcdef", "zz", "bc", "ef") == 3


def test_a_stop_may_span_characters_of_several_tokens() -> None:
    text = "größe 火曜日 ok"
    for stop in ("öß", "ße 火", "曜", "火曜日", "日 o"):
        assert first_stop(text, stop) == len(text[: text.index(stop)].encode()) + len(stop.encode())


def test_a_stop_of_the_prompt_does_not_count() -> None:
    assert first_stop("xyz", "ab", prompt=b"ab") is None
    assert first_stop("byz", "ab", prompt=b"a") is None
    assert first_stop("xab", "ab", prompt=b"ab") == 3


def test_long_stops_and_repetitions() -> None:
    stop = "a" * 200 + "b"
    assert first_stop("a" * 300 + "b", stop) == 301
    assert first_stop("ababababac", "abac") == 10


def test_bytes_of_no_character_do_not_hide_a_stop() -> None:
    watch = StopTexts(Bytes(), ["end"], [1])
    for token in [0xFF] * 40 + list(b"en"):
        assert not watch.push(token)
    assert watch.push(ord("d"))


def test_the_space_between_prompt_and_sample_counts() -> None:
    watch = StopTexts(Words(), [" w7"], [1, 2])
    assert watch.push(7)


def test_a_model_without_tokenizer_says_so(tmp_path: pytest.TempPathFactory) -> None:
    with pytest.raises(InvalidRequest, match="stop_tokens"):
        load_tokenizer(str(tmp_path))
