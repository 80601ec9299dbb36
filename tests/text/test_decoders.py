"""Pieces of text, joined, are what the tokenizers library makes of all the ids, however they come."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from loray.text.tokenizer import ByteDecoder, WindowDecoder
from loray.text.tokenizer import Tokenizer as BaseTokenizer
from tests.fixtures.tiny import byte_tokenizer

TEXT = "the cat sat on the mat, naïve café → 日本語日本 😀😀 Ünïcödé\n\tdef f(x):\n    return x  # 0123456789 " * 3


def bpe() -> Tokenizer:
    """A byte-level BPE with merges across characters, and added tokens of every kind."""
    tokenizer = Tokenizer(models.BPE())
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
    bytes_, window = (tokenizer, as_window(tokenizer))
    for decoding in (bytes_, window):
        decoder = decoding.decoder(skip_special_tokens=True, kept=frozenset(kept))
        assert "".join([*(decoder.push((i,)) for i in ids), decoder.flush()]) == expected


def as_window(tokenizer: BaseTokenizer) -> BaseTokenizer:
    """The same tokenizer with the decoder for those that are not made of bytes."""
    other = copy.copy(tokenizer)
    other._is_byte_level = False
    return other


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
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, vocab={f"<0x{b:02X}>": b for b in range(256)}, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    decoder = BaseTokenizer(tokenizer).decoder()
    assert isinstance(decoder, WindowDecoder)
    pieces = [decoder.push((byte,)) for byte in "aé→😀".encode()]
    assert [p for p in pieces if p] == ["a", "é", "→", "😀"]
    assert decoder.push((0xC3,)) == ""
    assert set(decoder.flush()) == {"\ufffd"}


_KNOWN: dict[str, BaseTokenizer] = {}


def tokenizer_of(name: str) -> BaseTokenizer:
    if name not in _KNOWN:
        _KNOWN[name] = BaseTokenizer(TOKENIZERS[name])
    return _KNOWN[name]
