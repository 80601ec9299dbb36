"""The tokenizer of a base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from loray.bases import tokenizer
from loray.text.decoders import ByteDecoder, ByteTable, SkippingDecoder, TextDecoder, WindowDecoder

_SHRINKING = 4  # characters that become one


class Tokenizer:
    """Encodes and decodes texts. May be used by several threads; they run side by side while they encode.

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
        self._first = around[: next(starts, 0)]  # the tokens that are put before a text
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
        """`special`: with the tokens that the tokenizer puts around a text."""
        # As a batch, because only that lets other threads run meanwhile; without offsets, which nobody reads.
        return tuple(self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def cut(self, ids: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
        """The last `num_tokens`; special tokens at the beginning stay there."""
        if len(ids) <= num_tokens:
            return ids
        first = self._first if ids[: len(self._first)] == self._first and len(self._first) < num_tokens else ()
        return first + ids[len(ids) - num_tokens + len(first) :]

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
        """As they stand in the vocabulary, which has other characters than their texts. Ids must be in it."""
        return [self._backend.id_to_token(token_id) or "" for token_id in token_ids]

    def text_of(self, token_id: int) -> str:
        """The text of one token by itself."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id])
        return text
