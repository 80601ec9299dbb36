"""What of an answer is sent, and when: server-sent events as the deltas come, or one body at the end."""

from __future__ import annotations

from typing import ClassVar, Protocol

from loray.api.openai.chunks import Chunks
from loray.api.openai.formats import ChatFormat, Choice, CompletionFormat, usage_of
from loray.api.openai.requests import GenerationRequest
from loray.spec import Delta
from serve_apps.gateway.errors import Failure


class Writer(Protocol):
    """Writes one answer. What it returns is sent at once; an empty text is not sent."""

    media_type: ClassVar[str]
    is_stream: ClassVar[bool]

    def push(self, index: int, delta: Delta) -> str:
        """Takes a delta of choice `index`."""

    def end(self) -> str:
        """After the last delta of all choices."""

    def failed(self, failure: Failure) -> str:
        """Instead of `end`, if an error ends a stream whose status has been sent."""


class Events:
    """Server-sent events in OpenAI's form: chunks, usage if it was asked for, `[DONE]`."""

    media_type: ClassVar[str] = "text/event-stream"
    is_stream: ClassVar[bool] = True

    def __init__(self, answer: CompletionFormat | ChatFormat, num_choices: int, num_per_prompt: int) -> None:
        self._answer, self._num_per_prompt = answer, num_per_prompt
        self._chunks = Chunks(answer, "data: ", "\n\n")
        self._choices = [Choice() for _ in range(num_choices)]

    def push(self, index: int, delta: Delta) -> str:
        if self._answer.include_usage:
            self._choices[index].count(delta)
        return self._chunks.push(index, delta)

    def end(self) -> str:
        if not self._answer.include_usage:
            return event("[DONE]")
        usage = self._answer.usage_chunk(usage_of(self._choices, self._num_per_prompt))
        return event(usage.to_json()) + event("[DONE]")

    def failed(self, failure: Failure) -> str:
        return event(failure.body)


class Whole:
    """One JSON body."""

    media_type: ClassVar[str] = "application/json"
    is_stream: ClassVar[bool] = False

    def __init__(self, answer: CompletionFormat | ChatFormat, num_choices: int, num_per_prompt: int) -> None:
        self._answer, self._num_per_prompt = answer, num_per_prompt
        self._choices = [Choice() for _ in range(num_choices)]

    def push(self, index: int, delta: Delta) -> str:
        self._choices[index].add(delta)
        return ""

    def end(self) -> str:
        return self._answer.whole(self._choices, usage_of(self._choices, self._num_per_prompt)).to_json()

    def failed(self, failure: Failure) -> str:
        return failure.body


def writer_of(answer: CompletionFormat | ChatFormat, num_choices: int, request: GenerationRequest) -> Writer:
    """As the request asks: events, or one body."""
    return (Events if request.stream else Whole)(answer, num_choices, request.n)


def event(data: str) -> str:
    return f"data: {data}\n\n"
