"""Turns a request's tokens into text as they come, and ends the text before a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loray.spec import FinishReason, SamplingParams
from loray.text.tokenizer import Tokenizer


class Text(NamedTuple):
    """New text that is certain, from the first `num_tokens` of the pushed ones.

    `stop`: a stop string that was found; neither text nor tokens follow.
    """

    text: str
    num_tokens: int
    stop: str | None = None

    @property
    def stopped(self) -> bool:
        return self.stop is not None


class Detokenizer:
    """Text that may be the beginning of a stop string, or part of a character, is not returned yet.

    As in vLLM, a stop string that begins in the first `min_tokens` tokens does not count.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_ids: Sequence[int] = (),
        kept: frozenset[str] = frozenset(),
    ) -> None:
        """`kept`: special tokens that become text although `params` skips special tokens."""
        self._decoder = tokenizer.decoder(prompt_ids, skip_special_tokens=params.skip_special_tokens, kept=kept)
        self._keeps_stop = params.include_stop_str_in_output
        self._stop = params.stop
        self._num_free = params.min_tokens  # tokens from now on in which no stop string counts
        self._held = ""

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None = None) -> Text:
        """The text of tokens; with a finish reason also the rest. A token that stops the request has no text."""
        written = token_ids[:-1] if finish_reason == "stop" and not self._keeps_stop else token_ids
        if not self._stop:
            text = self._decoder.push(written)
            if finish_reason is not None:
                text += self._decoder.flush()
            return Text(text, len(token_ids))
        pieces = []
        for i, token in enumerate(written):
            text, stop = self._until_stop(self._decoder.push((token,)), counts=self._num_free <= 0, final=False)
            self._num_free -= 1
            pieces.append(text)
            if stop is not None:
                return Text("".join(pieces), i + 1, stop)
        if finish_reason is None:
            return Text("".join(pieces), len(token_ids))
        text, stop = self._until_stop(self._decoder.flush(), counts=self._num_free < 0, final=True)
        return Text("".join([*pieces, text]), len(token_ids), stop)

    def _until_stop(self, new: str, *, counts: bool, final: bool) -> tuple[str, str | None]:
        """What of the text is certain, and the stop string that ended it."""
        text = self._held + new
        stop = self._stop if counts else ()
        found = [(i, i + len(s), s) for s in stop if (i := text.find(s)) >= 0]
        if found:
            self._held = ""
            start, end, which = min(found)
            return text[: end if self._keeps_stop else start], which
        hold = 0 if final else max((_overlap(text, s) for s in stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
