"""Words that an answer may not contain, as token ids."""

from __future__ import annotations

from collections.abc import Iterable

from loray.text.tokenizer import Tokenizer


def bad_word_ids(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """As vLLM does: each word as at the beginning of a text, and after a space where that is as many other tokens."""
    out: dict[tuple[int, ...], None] = {}
    for word in words:
        first = tokenizer.encode(word.lstrip(), special=False)
        spaced = tokenizer.encode(f" {word.lstrip()}", special=False)
        if first:
            out[first] = None
        if spaced and first and spaced[0] != first[0] and len(spaced) == len(first):
            out[spaced] = None
    return tuple(out)
