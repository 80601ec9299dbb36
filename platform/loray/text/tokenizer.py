"""Tokenizers of bases, and decoders that stream the text of tokens."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.pre_tokenizers import ByteLevel

from loray.bases import tokenizer

_WINDOW = 6  # tokens of the prompt that decide how the next ones are written


class TextDecoder(Protocol):
    """The text of one request's tokens."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is certain now. The beginning of a character waits for its end."""

    def flush(self) -> str:
        """The text that still waits; bytes that are no character become U+FFFD."""


# -- byte-level tokenizers --------------------------------------------------------------------------------------------


def _byte_of_char() -> Mapping[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
assert set(ByteLevel.alphabet()) == set(_BYTE_OF_CHAR)


class ByteTable(dict[int, str | bytes]):
    """Each token's text; its bytes, where they are not whole characters. Filled as tokens are met.

    A token that the vocabulary lacks has no text, and a special one has none if `skip_special_tokens`. A token with
    characters outside the alphabet, which only added tokens have, is written as it stands.
    """

    def __init__(self, token_of: Callable[[int], str | None], skipped: Iterable[str]) -> None:
        super().__init__()
        self._token_of, self._skipped = token_of, frozenset(skipped)

    def __missing__(self, token_id: int) -> str | bytes:
        token = self._token_of(token_id)
        if token is None or token in self._skipped:
            return ""  # not kept: unknown ids are without number
        if all(char in _BYTE_OF_CHAR for char in token):
            data = bytes(_BYTE_OF_CHAR[char] for char in token)
        else:
            data = token.encode()
        entry: str | bytes
        try:
            entry = data.decode()
        except UnicodeDecodeError:
            entry = data
        self[token_id] = entry
        return entry


class ByteDecoder:
    """A decoder of tokens that are bytes: one look into a table, and a UTF-8 decoder where characters span tokens."""

    def __init__(self, table: ByteTable) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._waits = False  # the decoder has the beginning of a character

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        if not self._waits:
            if len(token_ids) == 1:
                entry = table[token_ids[0]]
                if type(entry) is str:
                    return entry
            pieces = [table[token] for token in token_ids]
            try:
                return "".join(pieces)  # type: ignore[arg-type] # bytes among them are the exception
            except TypeError:
                pass
        data = b"".join(e.encode() if isinstance(e, str) else e for e in map(table.__getitem__, token_ids))
        text = self._utf8.decode(data)
        self._waits = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        self._waits = False
        return self._utf8.decode(b"", True)


# -- all others -------------------------------------------------------------------------------------------------------


class WindowDecoder:
    """A decoder for any tokenizer. Each step decodes the tokens since the last complete character, with those before as
    context.

    Decoding starts at the end of the prompt, because SentencePiece tokenizers drop the space at the beginning of a
    text.
    """

    def __init__(self, decode: Callable[[list[int]], Any], prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt_ids[-_WINDOW:])
        self._context = 0  # index of the token at which decoding starts
        self._known = len(self._ids)  # the text of the tokens before this index has been taken

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self._push, token_ids))

    def _push(self, token_id: int) -> str:
        self._ids.append(token_id)
        before, now = self._texts()
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._context, self._known = self._known, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        before, now = self._texts()
        self._known = len(self._ids)
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._ids[self._context : self._known]), self._decode(self._ids[self._context :])


class SkippingDecoder:
    """Another decoder, without some tokens."""

    def __init__(self, decoder: TextDecoder, skipped: Collection[int]) -> None:
        self._decoder, self._skipped = decoder, skipped

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.push([token for token in token_ids if token not in self._skipped])

    def flush(self) -> str:
        return self._decoder.flush()


_SHRINKING = 4  # characters that become one


class Tokenizer:
    """A tokenizer, which several threads may use; they run side by side while they encode.

    added_tokens          text → id of the tokens that are not made of others, special ones and markers of tool calls
    num_tokens            the vocabulary's, with added tokens
    max_token_characters  of a text, that one token stands for at most
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.num_tokens = max(vocabulary.values()) + 1
        longest = max(map(len, vocabulary))
        # A normalizer may make a text shorter before it is cut into tokens, as NFC does.
        self.max_token_characters = longest if self._backend.normalizer is None else _SHRINKING * longest
        around, text = self.encode("a", special=True), self.encode("a", special=False)
        starts = (i for i in range(len(around)) if around[i : i + len(text)] == text)
        start = next(starts, None)
        # The tokens that are put before a text, and after it.
        self._first, self._last = ((), ()) if start is None else (around[:start], around[start + len(text) :])
        self._texts: dict[int, str] = {}  # of single tokens; at most as many as the vocabulary
        added = self._backend.get_added_tokens_decoder()
        self.added_tokens = {token.content: token_id for token_id, token in added.items()}
        self._special = frozenset(token.content for token in added.values() if token.special)
        self._is_byte_level = isinstance(self._backend.decoder, decoders.ByteLevel)
        self._tables: dict[frozenset[str], ByteTable] = {}  # by the tokens that have no text

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer in a base's folder."""
        return cls(tokenizer.load(folder))

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """The tokens of a text. `special`: with those that the tokenizer puts around it."""
        # As a batch, because only that lets other threads run meanwhile; without offsets, which nobody reads.
        return tuple(self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def cut(self, ids: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
        """The last `num_tokens`; special tokens at the beginning stay there."""
        if len(ids) <= num_tokens:
            return ids
        first = self._first if ids[: len(self._first)] == self._first and len(self._first) < num_tokens else ()
        return first + ids[len(ids) - num_tokens + len(first) :]

    def head(self, ids: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
        """The first `num_tokens`; special tokens at the end stay there."""
        if len(ids) <= num_tokens:
            return ids
        num_last = len(self._last)
        last = self._last if num_last < num_tokens and ids[len(ids) - num_last :] == self._last else ()
        return ids[: num_tokens - len(last)] + last

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def decoder(
        self,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = False,
        kept: frozenset[str] = frozenset(),
    ) -> TextDecoder:
        """A decoder of the tokens that follow `prompt_ids`. `kept`: special tokens that are not skipped."""
        skipped = self._special - kept if skip_special_tokens else frozenset()
        if self._is_byte_level:
            if skipped not in self._tables:
                self._tables[skipped] = ByteTable(self._backend.id_to_token, skipped)
            return ByteDecoder(self._tables[skipped])
        if not skip_special_tokens or not kept & self._special:
            return WindowDecoder(lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens), prompt_ids)
        return SkippingDecoder(WindowDecoder(self.decode, prompt_ids), {self.added_tokens[token] for token in skipped})

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary has them, in other characters than their texts. Ids must be in it."""
        return [self._backend.id_to_token(token_id) or "" for token_id in token_ids]

    def text_of(self, token_id: int) -> str:
        """The text of one token by itself."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id])
        return text


def bad_word_ids(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of words that are not to be generated, as vLLM has them: of each word as at the beginning of a text,
    and after a space where that is as many other tokens.
    """
    out: dict[tuple[int, ...], None] = {}
    for word in words:
        first = tokenizer.encode(word.lstrip(), special=False)
        spaced = tokenizer.encode(f" {word.lstrip()}", special=False)
        if first:
            out[first] = None
        if spaced and first and spaced[0] != first[0] and len(spaced) == len(first):
            out[spaced] = None
    return tuple(out)
