"""Writers of the Responses API: the same deltas as a chat's, as typed events or as one response."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from loray.api.openai.formats import Choice, usage_of
from loray.api.openai.logprobs import chat_logprobs
from loray.api.openai.responses_api import Event, ResponseBuilder
from loray.spec import Delta
from serve_apps.gateway.answers.writers import Writer
from serve_apps.gateway.errors import Failure

_RATE_LIMITED = 429


class _Response:
    """What both writers do: they take the deltas of the only choice."""

    def __init__(self, builder: ResponseBuilder) -> None:
        self._builder = builder
        self._choice = Choice()

    def _take(self, delta: Delta) -> list[Event]:
        builder = self._builder
        events = []
        self._choice.count(delta)
        self._choice.finish_reason = delta.finish_reason or self._choice.finish_reason
        if delta.text:
            events += builder.text(delta.text, _logprobs(delta))
        for call in delta.tool_calls:
            if call.id is not None and call.name is not None:
                events += builder.call(call.id, call.name)
            events += builder.arguments(call.arguments)
        return events

    def _finish(self) -> list[Event]:
        return self._builder.finish(self._choice.finish_reason, usage_of([self._choice], 1))


class ResponseEvents(_Response):
    media_type: ClassVar[str] = "text/event-stream"
    is_stream: ClassVar[bool] = True

    def __init__(self, builder: ResponseBuilder) -> None:
        super().__init__(builder)
        self._is_first = True

    def push(self, index: int, delta: Delta) -> str:
        opening = self._builder.opening() if self._is_first else []
        self._is_first = False
        return _events(opening + self._take(delta))

    def end(self) -> str:
        return _events(self._finish())

    def failed(self, failure: Failure) -> str:
        opening = self._builder.opening() if self._is_first else []
        return _events(opening + self._builder.fail(_code(failure), failure.error.message))


class WholeResponse(_Response):
    media_type: ClassVar[str] = "application/json"
    is_stream: ClassVar[bool] = False

    def push(self, index: int, delta: Delta) -> str:
        self._take(delta)
        return ""

    def end(self) -> str:
        return _json(self._finish()[-1]["response"])

    def failed(self, failure: Failure) -> str:
        return failure.body


def response_writer(builder: ResponseBuilder, *, stream: bool) -> Writer:
    return (ResponseEvents if stream else WholeResponse)(builder)


def _logprobs(delta: Delta) -> list[dict[str, Any]]:
    logprobs = chat_logprobs(delta.logprobs)
    return [] if logprobs is None else [token.model_dump() for token in logprobs.content]


def _code(failure: Failure) -> str:
    """OpenAI's code of a response's error."""
    if failure.status == _RATE_LIMITED:
        return "rate_limit_exceeded"
    return "invalid_prompt" if failure.status < 500 else "server_error"


def _events(events: list[Event]) -> str:
    return "".join(f"event: {e['type']}\ndata: {_json(e)}\n\n" for e in events)


def _json(value: Event) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
