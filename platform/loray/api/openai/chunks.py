"""The chunks of a stream as JSON. Most differ in their text alone, so the rest is written once for each choice."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from json.encoder import encode_basestring
from typing import NamedTuple

from loray.api.openai.extras import NO_EXTRAS
from loray.api.openai.formats import ChatFormat, CompletionFormat
from loray.spec import Delta, FinishReason

# What stands in a sample chunk for the values of one request.
_ID, _MODEL, _FINGERPRINT, _TEXT = "@id", "@model", "@fingerprint", "@text"
_CREATED, _INDEX = 10**17 + 1, 10**17 + 2


class Template(NamedTuple):
    """A chunk is `head`, its text as a JSON string, `tail`. Without a text it is `head` alone."""

    head: str
    tail: str

    def fill(self, text: str) -> str:
        return f"{self.head}{encode_basestring(text)}{self.tail}" if self.tail else self.head


class Chunks:
    """Writes the chunks of one stream, each between `before` and `after`. They are those of the format, byte for byte.

    Chunks with log-probabilities, calls of tools or extras are rare, and the format itself writes them.
    """

    def __init__(self, answer: CompletionFormat | ChatFormat, before: str = "", after: str = "") -> None:
        self._answer, self._before, self._after = answer, before, after
        self._shape = replace(
            answer, id=_ID, created=_CREATED, model=_MODEL, fingerprint=_FINGERPRINT, extras=NO_EXTRAS
        )
        self._has_extras = answer.extras.any
        self._plain: dict[int, Template] = {}  # by choice: chunks of text before the last

    def push(self, index: int, delta: Delta) -> str:
        """The chunks of a delta of choice `index`: none, one, or two with the choice's first."""
        plain = self._plain.get(index)
        opening = ""
        if plain is None:
            plain = self._plain[index] = self._template(index, None, True)
            if (first := self._answer.opening(index)) is not None:
                opening = f"{self._before}{first.to_json()}{self._after}"
        if not (delta.text or delta.finish_reason or delta.logprobs or delta.tool_calls or self._has_extras):
            return opening
        if delta.logprobs is not None or delta.tool_calls or self._has_extras or delta.stop_reason is not None:
            return f"{opening}{self._before}{self._answer.chunk(index, delta).to_json()}{self._after}"
        if delta.finish_reason is not None:
            plain = self._template(index, delta.finish_reason, bool(delta.text))
        return opening + plain.fill(delta.text)

    def _template(self, index: int, finish_reason: FinishReason | None, has_text: bool) -> Template:
        head, tail = _sample(self._shape, finish_reason, has_text)
        answer = self._answer
        for mark, value in (
            (f'"{_ID}"', encode_basestring(answer.id)),
            (str(_CREATED), str(answer.created)),
            (str(_INDEX), str(index)),
            (f'"{_FINGERPRINT}"', encode_basestring(answer.fingerprint)),
            (f'"{_MODEL}"', encode_basestring(answer.model)),  # last: it is the client's, and may contain a mark
        ):
            head = head.replace(mark, value, 1)
        if not tail:
            return Template(f"{self._before}{head}{self._after}", "")
        return Template(f"{self._before}{head}", f"{tail}{self._after}")


@lru_cache(maxsize=64)
def _sample(shape: CompletionFormat | ChatFormat, finish_reason: FinishReason | None, has_text: bool) -> Template:
    delta = Delta(_TEXT if has_text else "", (), None, finish_reason, 0, 0)
    head, _, tail = shape.chunk(_INDEX, delta).to_json().partition(f'"{_TEXT}"')
    return Template(head, tail)
