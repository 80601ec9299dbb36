"""The tokenizer of a base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import decoders

from loray.text.decoders import ByteDecoder, ByteTable, TextDecoder, WindowDecoder


class Tokenizer:
    """Encodes and decodes texts. May be used by several threads."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is transformers', with a backend of the tokenizers library."""
        self.transformers = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._texts: dict[int, str] = {}  # of single tokens; at most as many as the vocabulary
        self._tables = self._byte_tables()
        # A fast tokenizer changes its state at the first call only (truncation off); then threads may share it.
        self.encode("warm", special=True)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer in a base's folder."""
        from transformers import AutoTokenizer  # takes seconds

        return cls(AutoTokenizer.from_pretrained(str(folder)))

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """`special`: with the tokens that the tokenizer puts around a text."""
        return tuple(self.transformers(text, add_special_tokens=special, verbose=False)["input_ids"])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def decoder(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = False) -> TextDecoder:
        """A decoder of the tokens that follow `prompt_ids`."""
        if self._tables is not None:
            return ByteDecoder(self._tables[skip_special_tokens])
        return WindowDecoder(lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens), prompt_ids)

    def text_of(self, token_id: int) -> str:
        """The text of one token by itself."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id])
        return text

    def _byte_tables(self) -> tuple[ByteTable, ByteTable] | None:
        """Tables of all tokens, and without the special ones; None if the tokens are not bytes."""
        if not isinstance(self._backend.decoder, decoders.ByteLevel):
            return None
        added = self._backend.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        return ByteTable(self._backend.id_to_token, ()), ByteTable(self._backend.id_to_token, special)
