"""Texts as token ids; and pieces of text, joined, are what the tokenizers library makes of all the ids."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from loray.text.tokenizer import ByteDecoder, Tokenizer, WindowDecoder
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


@pytest.mark.parametrize("num_tokens", [9, 5, 4, 3])
def test_the_first_tokens_are_those_of_transformers_truncation(num_tokens: int) -> None:
    fast = with_first_token()
    expected = fast("abc", truncation=True, max_length=num_tokens)["input_ids"]
    tokenizer = Tokenizer(fast.backend_tokenizer)
    assert list(tokenizer.head(tokenizer.encode("abc", special=True), num_tokens)) == expected
    assert tokenizer.head((1, 2, 3), 2) == (1, 2)  # a client's ids, which end in no special token
    assert Tokenizer(byte_tokenizer().backend_tokenizer).head((1, 2, 3), 1) == (1,)


TEXT = "the cat sat on the mat, naïve café → 日本語日本 😀😀 Ünïcödé\n\tdef f(x):\n    return x  # 0123456789 " * 3


def bpe() -> Backend:
    """A byte-level BPE with merges across characters, and added tokens of every kind."""
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<|end|>", AddedToken("<|ünï→|>", special=True)])
    # In the order: outside the alphabet; inside it, and so half a character; with a space; plain.
    tokenizer.add_tokens(["→→", "é", "<tool call>", "<tool>"])
    return tokenizer


TOKENIZERS = {"bpe": bpe(), "bytes": byte_tokenizer().backend_tokenizer}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip", [False, True])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_in_any_pieces(name: str, skip: bool, data: Any) -> None:
    backend = TOKENIZERS[name]
    num_ids = backend.get_vocab_size() + 3  # some that are no token
    pieces = data.draw(st.lists(st.lists(st.integers(0, num_ids - 1), max_size=5), max_size=12))
    decoder = tokenizer_of(name).decoder(skip_special_tokens=skip)
    assert isinstance(decoder, ByteDecoder)
    texts = [decoder.push(tuple(piece)) for piece in pieces]
    text = "".join(texts) + decoder.flush()
    assert text == backend.decode([t for piece in pieces for t in piece], skip_special_tokens=skip)
    assert decoder.flush() == ""


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_special_tokens_that_are_kept(name: str, data: Any) -> None:
    tokenizer, backend = tokenizer_of(name), TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() - 1), max_size=12))
    kept = data.draw(st.sets(st.sampled_from(sorted(tokenizer.added_tokens))))
    skipped = {i for i, t in backend.get_added_tokens_decoder().items() if t.special and t.content not in kept}
    expected = backend.decode([i for i in ids if i not in skipped], skip_special_tokens=False)
    window = copy.copy(tokenizer)
    window._is_byte_level = False  # as those that are not made of bytes
    for decoding in (tokenizer, window):
        decoder = decoding.decoder(skip_special_tokens=True, kept=frozenset(kept))
        assert "".join([*(decoder.push((i,)) for i in ids), decoder.flush()]) == expected


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_characters="é\ufffd", exclude_categories=["Cs"])), size=st.integers(1, 4))
def test_characters_are_whole(text: str, size: int) -> None:
    ids = TOKENIZERS["bpe"].encode(text, add_special_tokens=False).ids
    decoder = tokenizer_of("bpe").decoder()
    pieces = [decoder.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert decoder.flush() == ""
    assert "".join(pieces) == TOKENIZERS["bpe"].decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_tokenizers_that_are_not_byte_level_are_decoded_in_a_window() -> None:
    tokenizer = Backend(models.BPE(byte_fallback=True, vocab={f"<0x{b:02X}>": b for b in range(256)}, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    decoder = Tokenizer(tokenizer).decoder()
    assert isinstance(decoder, WindowDecoder)
    pieces = [decoder.push((byte,)) for byte in "aé→😀".encode()]
    assert [p for p in pieces if p] == ["a", "é", "→", "😀"]
    assert decoder.push((0xC3,)) == ""
    assert set(decoder.flush()) == {"\ufffd"}


@cache
def tokenizer_of(name: str) -> Tokenizer:
    return Tokenizer(TOKENIZERS[name])
