"""Turns a request's tokens into text as they come, and ends the text before a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loray.spec import FinishReason, SamplingParams
from loray.text.tokenizer import Tokenizer

_PROMPT_TAIL = 6  # tokens that decide how the next ones are written


class Text(NamedTuple):
    """New text that is certain. `stopped`: a stop string was found, and no text follows."""

    text: str
    stopped: bool


class Detokenizer:
    """Text that may be the beginning of a stop string, or part of a character, is not returned yet.

    Decoding starts at the end of the prompt, because SentencePiece tokenizers drop the
    space at the beginning of a text. Each step decodes only the tokens since the last complete character, with the
    tokens before them as context. As in vLLM, a stop string that begins in the first
    `min_tokens` tokens does not count.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer, self._params = tokenizer, params
        self._stop: tuple[str, ...] = ()
        self._num_pushed = 0
        self._ids = list(prompt_ids[-_PROMPT_TAIL:])
        self._context = 0  # index of the token at which decoding starts
        self._known = len(self._ids)  # the text of the tokens before this index has been taken
        self._held = ""

    def step(self, token_id: int | None, finish_reason: FinishReason | None) -> Text:
        """The text of a token; with a finish reason also the rest. A token that stops the request has no text."""
        text = Text("", False)
        if token_id is not None and (finish_reason != "stop" or self._params.include_stop_str_in_output):
            text = self.push(token_id)
        if finish_reason is not None and not text.stopped:
            rest = self.flush()
            text = Text(text.text + rest.text, rest.stopped)
        return text

    def push(self, token_id: int) -> Text:
        self._num_pushed += 1
        if self._num_pushed > self._params.min_tokens:
            self._stop = self._params.stop
        self._ids.append(token_id)
        before, now = self._decode(self._ids[self._context : self._known]), self._decode(self._ids[self._context :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return Text("", False)
        self._context, self._known = self._known, len(self._ids)
        return self._take(now[len(before) :], final=False)

    def flush(self) -> Text:
        """The text that was not returned yet; bytes that are no character become U+FFFD."""
        before, now = self._decode(self._ids[self._context : self._known]), self._decode(self._ids[self._context :])
        return self._take(now[len(before) :], final=True)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._params.skip_special_tokens)

    def _take(self, new: str, *, final: bool) -> Text:
        text = self._held + new
        found = [(i, i + len(s)) for s in self._stop if (i := text.find(s)) >= 0]
        if found:
            self._held = ""
            start, end = min(found)
            return Text(text[: end if self._params.include_stop_str_in_output else start], True)
        hold = 0 if final else max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return Text(text[: len(text) - hold], False)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
