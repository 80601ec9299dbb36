"""From token ids to text as they come. The pieces, joined, are what the tokenizer makes of all the ids."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from tokenizers.pre_tokenizers import ByteLevel

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
    """For tokens that are bytes: one look into a table, and a UTF-8 decoder where characters span tokens."""

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
    """For any tokenizer. Each step decodes the tokens since the last complete character, with those before as context.

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
