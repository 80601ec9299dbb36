"""From a request's tokens to its text, as they come, ending before a stop string."""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream


class Text(NamedTuple):
    """Text that is certain by now; `stopped` once a stop string was found, and nothing follows."""

    text: str
    stopped: bool


class Detokenizer:
    """`tokenizer` is transformers' fast one. Text that may be the beginning of a stop string is held back."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._ids: list[int] = []
        self._emitted = ""  # everything decoded so far, held back or not
        self._held = ""

    def push(self, token_id: int) -> Text:
        self._ids.append(token_id)
        return self._take(self._stream.step(self._tokenizer.backend_tokenizer, token_id) or "", final=False)

    def flush(self) -> Text:
        """What is held back, and bytes that never became a character (as U+FFFD)."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self._take(whole[len(self._emitted) :] if whole.startswith(self._emitted) else "", final=True)

    def _take(self, new: str, *, final: bool) -> Text:
        self._emitted += new
        text = self._held + new
        found = [i for i in (text.find(s) for s in self._stop) if i >= 0]
        if found:
            self._held = ""
            return Text(text[: min(found)], True)
        hold = 0 if final else max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return Text(text[: len(text) - hold], False)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
