"""Texts as token ids."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, processors

from loray.text.tokenizer import Tokenizer
from tests.fixtures.tiny import byte_tokenizer


def with_first_token() -> Any:
    """The tiny tokenizer with a token before each text, as Llama's has."""
    fast = byte_tokenizer()
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 257), ("<|im_end|>", 258)]
    )
    return fast


@given(st.text(), st.booleans())
def test_ids_are_transformers(text: str, special: bool) -> None:
    for fast in (byte_tokenizer(), with_first_token()):
        expected = fast(text, add_special_tokens=special, verbose=False)["input_ids"]
        assert list(Tokenizer(fast.backend_tokenizer).encode(text, special=special)) == expected


def test_a_truncation_that_the_file_asks_for_is_off() -> None:
    fast = byte_tokenizer()
    fast.backend_tokenizer.enable_truncation(4)
    fast.backend_tokenizer.enable_padding(length=8)
    assert len(Tokenizer(fast.backend_tokenizer).encode("x" * 5, special=True)) == 5


def test_characters_of_a_token() -> None:
    assert Tokenizer(byte_tokenizer().backend_tokenizer).max_token_characters == len("<|endoftext|>")
    fast = byte_tokenizer()
    fast.add_tokens([AddedToken("x" * 40)])
    assert Tokenizer(fast.backend_tokenizer).max_token_characters == 40
    fast.backend_tokenizer.normalizer = normalizers.NFC()  # of what it makes shorter, more characters are one token
    assert Tokenizer(fast.backend_tokenizer).max_token_characters == 160


@pytest.mark.parametrize(("num_tokens", "expected"), [(9, b"abc"), (5, b"abc"), (4, b"bc"), (2, b""), (1, b"")])
def test_cutting_keeps_the_first_special_token(num_tokens: int, expected: bytes) -> None:
    tokenizer = Tokenizer(with_first_token().backend_tokenizer)
    cut = tokenizer.cut(tokenizer.encode("abc", special=True), num_tokens)
    ids = tuple(b - 33 for b in expected)
    assert cut == ((257, *ids, 258) if num_tokens > 1 else (258,))
    assert Tokenizer(byte_tokenizer().backend_tokenizer).cut((1, 2, 3), 2) == (2, 3)
