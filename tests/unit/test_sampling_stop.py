"""Stop texts, on tokenizers that split characters and words."""

from collections.abc import Sequence
from functools import cache
from itertools import chain, takewhile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.real_model import real_model_directory
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


# ---- what decoding all tokens would find ----------------------------------------------------------------------------

PIECES = ("I", "END", "\n", " ", "a", "b", "ö", "火", "❤️", "�", ".", ",", "<s>")
"""Of the tokenizers below, which spell other characters by their bytes if they can."""


def built(model: Any, decoder: Any) -> Any:
    """A tokenizer with a special token."""
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level() -> Any:
    """As GPT-2's and Llama 3's: pieces are bytes, written as letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = ["".join(word for word, _ in splitter.pre_tokenize_str(piece)) for piece in (*PIECES, " END", "❤", "\n\n")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*letters, *words]))}
    return built(models.BPE(vocabulary, []), decoders.ByteLevel())


def byte_fallback() -> Any:
    """As Llama 2's, Gemma's and Mistral's: a piece is text, or one byte; a run of bytes is text only as a whole."""
    own = set(PIECES) - {"❤️", "火", "\n"}
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *sorted(own), "▁", "▁END", "▁a", "▁▁"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return built(models.BPE(vocabulary, [], byte_fallback=True), decoders.Sequence(steps))


def metaspace() -> Any:
    """As T5's."""
    vocabulary = [(piece, -1.0) for piece in ("<unk>", *PIECES, "▁", "▁END", "▁a", "▁▁", "b▁")]
    return built(models.Unigram(vocabulary, 0, False), decoders.Metaspace())


def word_pieces() -> Any:
    """As BERT's: a piece that begins a word brings a space."""
    pieces = ["[UNK]", *PIECES, *(f"##{piece}" for piece in PIECES)]
    model = models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    return built(model, decoders.WordPiece())


def suffixes() -> Any:
    """As the first GPT's: a piece that ends a word brings a space, unless it is the last of all."""
    pieces = ["<unk>", *PIECES, *(f"{piece}</w>" for piece in PIECES)]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>")
    return built(model, decoders.BPEDecoder("</w>"))


def real() -> Any:
    return load_tokenizer(str(real_model_directory()))


KINDS = {each.__name__: cache(each) for each in (byte_level, byte_fallback, metaspace, word_pieces, suffixes, real)}


def whole_text(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """What the tokens add to the prompt, decoded all together."""
    before, after = (
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in (list(prompt), [*prompt, *tokens])
    )
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
    return after[len(list(shared)) :]


def check_against_the_whole(kind: str, prompt: list[int], tokens: list[int], stops: list[str]) -> None:
    tokenizer = KINDS[kind]()
    watch = StopTexts(tokenizer, stops, prompt).fork()
    for count, token in enumerate(tokens, 1):
        text = whole_text(tokenizer, prompt, tokens[:count])
        found = any(stop in text for stop in stops)
        assert watch.push(token) == found, (text, stops)
        if found:
            return


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_stop_is_found_where_decoding_all_tokens_finds_it(kind: str, data: st.DataObject) -> None:
    """In any tokens, also of half characters and of none; the stop texts are parts of what they spell, and others."""
    tokenizer = KINDS[kind]()
    size = len(tokenizer)
    # Few kinds of tokens in a sample, so that they meet: high bytes are the interesting ones.
    few = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=12))
    emoji = tokenizer.encode("I ❤️\nEND", add_special_tokens=False)
    some = st.one_of(st.sampled_from(few), st.sampled_from(emoji) if emoji else st.nothing())
    runs = st.lists(st.one_of(some.map(lambda token: [token]), st.just(emoji)), max_size=30)
    prompt, tokens = (list(chain(*data.draw(runs))) for _ in range(2))
    whole = whole_text(tokenizer, prompt, tokens)
    starts = st.integers(0, max(0, len(whole) - 1))
    parts = st.builds(lambda start, length: whole[start : start + length], starts, st.integers(1, 6)).filter(bool)
    known = st.sampled_from(["END", "\nE", "�" * 2])
    stop = st.one_of(parts, known) if whole else known
    stops = data.draw(st.lists(stop, min_size=1, max_size=3))
    check_against_the_whole(kind, prompt, tokens, stops)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_behind_a_character_of_many_tokens(kind: str) -> None:
    tokenizer = KINDS[kind]()
    for text in ("I ❤️\nEND", "❤️" * 20 + "\nEND", "öö火" * 9 + " END"):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        for stop in ("\n", "END", "️\n", "x"):
            check_against_the_whole(kind, tokens[:2], tokens, [stop])


@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens_are_decoded_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = KINDS[kind]()
    tokens = tokenizer.encode("I ❤️ a b\n" * 200, add_special_tokens=False)
    watch = StopTexts(tokenizer, ["END"], tokens[:100])
    longest = 0
    decode = tokenizer.decode

    def counted(ids: list[int], **settings: bool) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        text: str = decode(ids, **settings)
        return text

    monkeypatch.setattr(tokenizer, "decode", counted)
    assert not any(watch.push(token) for token in tokens)
    assert longest < 64


def test_a_model_without_tokenizer_says_so(tmp_path: pytest.TempPathFactory) -> None:
    with pytest.raises(InvalidRequest, match="stop_tokens"):
        load_tokenizer(str(tmp_path))
