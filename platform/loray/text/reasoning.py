"""Thoughts of reasoning models: what stands between `<think>` and `</think>` before an answer's content.

The two are single tokens of the vocabulary, and thoughts are told from content by token ids alone. So a text that
merely looks like a marker is none, and the engine, which sees no text, finds the same.

Sources: the chat templates of Qwen3 (which opens no thought in the prompt, and closes an empty one there where
`enable_thinking` is false) and of DeepSeek-R1 (which always opens one).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from loray.spec import FinishReason, ReasoningParserName, SamplingParams, Thinking
from loray.text.tokenizer import TextDecoder, Tokenizer

START, END = "<think>", "</think>"
_AROUND = "\n"  # what models write around a thought, which is part neither of it nor of the content


def detect(added_tokens: Collection[str], template: str) -> ReasoningParserName | None:
    """The form in which a base thinks, by its tokenizer's added tokens and the text of its chat template; None: it does
    not.
    """
    if START not in added_tokens or END not in added_tokens or not (START in template or END in template):
        return None
    return "qwen3" if "enable_thinking" in template else "deepseek_r1"


def thinking_after(prompt_ids: Sequence[int], added_tokens: Mapping[str, int], budget: int | None) -> Thinking:
    """Say whether a thought is open or over after a prompt. The last marker says it, unless another added token (such
    as that of a turn) stands behind it. `budget` is Thinking's.
    """
    start, end = added_tokens[START], added_tokens[END]
    thinking = Thinking(start_id=start, end_id=end, budget=budget)
    if start not in prompt_ids and end not in prompt_ids:
        return thinking
    added = frozenset(added_tokens.values())
    last = next((token for token in reversed(prompt_ids) if token in added), None)
    if last == start:
        return thinking.model_copy(update={"state": "open"})
    return thinking.model_copy(update={"state": "over"}) if last == end else thinking


class ThoughtReader:
    """A reader of one answer's tokens, which finds its thought.

    is_open       the next token belongs to the thought, or closes it
    content_from  the number of the token with which the content begins; None: it has not begun
    num_read      tokens of the answer so far
    num_tokens    those of the thought, without the tokens that open and close it
    """

    __slots__ = ("_begin", "content_from", "num_read", "thinking")

    def __init__(self, thinking: Thinking) -> None:
        self.thinking = thinking
        self._begin = 0 if thinking.state == "open" else None
        self.content_from: int | None = None
        self.num_read = 0

    @property
    def is_open(self) -> bool:
        return self._begin is not None and self.content_from is None

    @property
    def num_tokens(self) -> int:
        if self._begin is None:
            return 0
        return (self.num_read if self.content_from is None else self.content_from - 1) - self._begin

    def read(self, token_ids: Sequence[int]) -> None:
        """Take in the answer's next tokens."""
        if self.content_from is None and token_ids:
            begin, at = self._begin, self.num_read
            if begin is None and token_ids[0] == self.thinking.start_id:
                begin = self._begin = 1
            if begin is None:
                self.content_from = 0
            elif self.thinking.end_id in token_ids:
                self.content_from = at + token_ids.index(self.thinking.end_id) + 1
        self.num_read += len(token_ids)


class ThoughtText:
    """The text of one answer's thought, without the newlines around it."""

    def __init__(
        self, tokenizer: Tokenizer, thinking: Thinking, params: SamplingParams, prompt_ids: Sequence[int]
    ) -> None:
        self.reader = ThoughtReader(thinking)
        self._decoder = tokenizer.decoder(prompt_ids, skip_special_tokens=params.skip_special_tokens)
        self._held: str | None = None  # newlines, after which something may come; None: nothing has come

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None = None) -> tuple[str, int]:
        """The thought's new text, and how many of the tokens are before the content."""
        reader = self.reader
        num_read, num_before = reader.num_read, reader.num_tokens
        reader.read(token_ids)
        is_over = reader.content_from is not None
        num_new = len(token_ids) if reader.content_from is None else reader.content_from - num_read
        stop = max(0, num_new - is_over)  # the last one closes it
        own = token_ids[stop - (reader.num_tokens - num_before) : stop]
        text = self._decoder.push(own[:-1] if finish_reason == "stop" and not is_over else own)
        if is_over or finish_reason is not None:
            text += self._decoder.flush()
        text = text.lstrip(_AROUND) if self._held is None else self._held + text
        thought = text.rstrip(_AROUND)
        if thought or self._held is not None:
            self._held = text[len(thought) :]
        return thought, num_new


class ContentDecoder:
    """A decoder of the content after a thought, without the newlines with which it begins."""

    def __init__(self, decoder: TextDecoder) -> None:
        self._decoder, self._has_begun = decoder, False

    def push(self, token_ids: Sequence[int]) -> str:
        text = self._decoder.push(token_ids)
        if not self._has_begun:
            text = text.lstrip(_AROUND)
            self._has_begun = bool(text)
        return text

    def flush(self) -> str:
        return self._decoder.flush()
