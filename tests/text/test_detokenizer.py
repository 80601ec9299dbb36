"""The text of a request's tokens: complete characters, stop strings, special tokens."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from loray.bases.registry import BaseModel
from loray.spec import SamplingParams
from loray.text.detokenizer import Detokenizer
from loray.text.tokenizer import Tokenizer


def text_of(base: BaseModel, data: bytes, *stop: str, **params: Any) -> tuple[list[str], bool]:
    """Pieces as they come, and whether a stop string ended them."""
    detokenizer = Detokenizer(Tokenizer.load(base.path), SamplingParams(stop=stop, **params))
    byte_ids = AutoTokenizer.from_pretrained(base.path).convert_tokens_to_ids
    from tokenizers import pre_tokenizers

    pieces = []
    for token in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(data.decode()):
        for char in token[0]:
            text, _, stopped = detokenizer.push((byte_ids(char),))
            pieces.append(text)
            if stopped:
                return pieces, True
    rest = detokenizer.push((), "length")
    return [*pieces, rest.text], rest.stopped


def test_characters_come_whole(base: BaseModel) -> None:
    pieces, _ = text_of(base, "aé→😀".encode())
    assert [p for p in pieces if p] == ["a", "é", "→", "😀"]


def test_text_ends_before_a_stop_string_that_spans_tokens(base: BaseModel) -> None:
    pieces, stopped = text_of(base, b"one END two", "END")
    assert stopped
    assert "".join(pieces) == "one "


def test_a_stop_string_may_stay_in_the_text(base: BaseModel) -> None:
    pieces, stopped = text_of(base, b"one END two", "D", "END", include_stop_str_in_output=True)
    assert stopped
    assert "".join(pieces) == "one END"


def test_a_stop_string_among_the_first_tokens_does_not_count(base: BaseModel) -> None:
    pieces, stopped = text_of(base, b"END END", "END", min_tokens=2)
    assert stopped
    assert "".join(pieces) == "END "


def test_a_token_that_ends_the_request_is_no_text_unless_asked_for(base: BaseModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    a, b, eos = *tokenizer("ab")["input_ids"], tokenizer.eos_token_id
    for params, token, text in (
        ({}, b, "a"),
        ({"include_stop_str_in_output": True}, b, "ab"),
        ({"include_stop_str_in_output": True}, eos, "a"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, eos, "a<|im_end|>"),
    ):
        detokenizer = Detokenizer(Tokenizer(tokenizer.backend_tokenizer), SamplingParams(**params))
        assert detokenizer.push((a,)).text + detokenizer.push((token,), "stop").text == text


def test_what_only_looks_like_a_stop_string_is_held_back_and_then_given(base: BaseModel) -> None:
    pieces, stopped = text_of(base, b"EN EEND", "END!", "XX")
    assert not stopped
    assert "".join(pieces) == "EN EEND"
    assert pieces[:3] == ["", "", "EN "]


def test_bytes_that_never_become_a_character_end_as_replacement(base: BaseModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    detokenizer = Detokenizer(Tokenizer(tokenizer.backend_tokenizer), SamplingParams())
    first = tokenizer("é")["input_ids"][0]
    assert detokenizer.push((first,)).text == ""
    assert detokenizer.push((), "length").text == "\ufffd"


def test_the_space_before_the_first_word_stays() -> None:
    """SentencePiece tokenizers write ▁word and drop the space where a text begins."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    tokenizer = Backend(
        models.WordLevel({"▁The": 0, "▁capital": 1, "▁Paris": 2, "!": 3, "<unk>": 4}, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Metaspace()
    detokenizer = Detokenizer(Tokenizer(tokenizer), SamplingParams(), [0, 1])
    assert [detokenizer.push((2,)).text, detokenizer.push((3,), "length").text] == [" Paris", "!"]
