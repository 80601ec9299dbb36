"""Writers of answers, server-sent events or one body: of completions and chats, of the Responses and Messages APIs."""

from __future__ import annotations

import json
import struct
from base64 import b64encode
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

from loray.schemas.anthropic import MessageBuilder
from loray.schemas.openai import CompletionRequest
from loray.schemas.openai.formats import ChatFormat, Choice, Chunks, CompletionFormat, chat_logprobs, usage_of
from loray.schemas.openai.requests import GenerationRequest
from loray.schemas.openai.responses_api import Event, ResponseBuilder
from loray.spec import Delta, GenerateRequest, TokenDelta, TokenLogprob
from loray.text.detokenizer import RequestText
from serve_apps.gateway import anthropic
from serve_apps.gateway.errors import Failure

WAITING = ": waiting\n\n"  # a comment, which clients of server-sent events skip


class AnswerWriter(Protocol):
    """Writes one answer. What it returns is sent at once; an empty text is not sent.

    heartbeat  what a stream is sent in silence; empty: the answer is one body
    """

    media_type: ClassVar[str]
    heartbeat: ClassVar[str]

    def push(self, index: int, delta: Delta) -> str:
        """Take a delta of choice `index`."""

    def end(self) -> str:
        """End the answer after the last delta of all choices."""

    def failed(self, failure: Failure) -> str:
        """End a stream whose status has been sent with an error, instead of `end`."""


class Events:
    """Writes server-sent events in OpenAI's form: chunks, usage if it was asked for, `[DONE]`."""

    media_type: ClassVar[str] = "text/event-stream"
    heartbeat: ClassVar[str] = WAITING

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
    """Writes one JSON body."""

    media_type: ClassVar[str] = "application/json"
    heartbeat: ClassVar[str] = ""

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


def writer_of(answer: CompletionFormat | ChatFormat, num_choices: int, request: GenerationRequest) -> AnswerWriter:
    """Choose the writer that the request asks for: events, or one body."""
    return (Events if request.stream else Whole)(answer, num_choices, request.n)


def event(data: str) -> str:
    return f"data: {data}\n\n"


class _ResponseWriter:
    """Takes the deltas of the only choice, for both writers of the Responses API."""

    def __init__(self, builder: ResponseBuilder) -> None:
        self._builder = builder
        self._choice = Choice()

    def _take(self, delta: Delta) -> list[Event]:
        builder = self._builder
        events = []
        self._choice.count(delta)
        self._choice.finish_reason = delta.finish_reason or self._choice.finish_reason
        if delta.reasoning:
            events += builder.reasoning(delta.reasoning)
        if delta.text:
            events += builder.text(delta.text, _logprobs(delta))
        for call in delta.tool_calls:
            if call.id is not None and call.name is not None:
                events += builder.call(call.id, call.name)
            events += builder.arguments(call.arguments)
        return events

    def _finish(self) -> list[Event]:
        return self._builder.finish(self._choice.finish_reason, usage_of([self._choice], 1))


class ResponseEvents(_ResponseWriter):
    media_type: ClassVar[str] = "text/event-stream"
    heartbeat: ClassVar[str] = WAITING

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


class WholeResponse(_ResponseWriter):
    media_type: ClassVar[str] = "application/json"
    heartbeat: ClassVar[str] = ""

    def push(self, index: int, delta: Delta) -> str:
        self._take(delta)
        return ""

    def end(self) -> str:
        return _json(self._finish()[-1]["response"])

    def failed(self, failure: Failure) -> str:
        return failure.body


def response_writer(builder: ResponseBuilder, *, stream: bool) -> AnswerWriter:
    return (ResponseEvents if stream else WholeResponse)(builder)


class MessageEvents:
    """Writes a message of Anthropic's API as events."""

    media_type: ClassVar[str] = "text/event-stream"
    heartbeat: ClassVar[str] = 'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, builder: MessageBuilder) -> None:
        self._builder = builder

    def push(self, index: int, delta: Delta) -> str:
        return _events(self._builder.push(delta))

    def end(self) -> str:
        return _events(self._builder.end())

    def failed(self, failure: Failure) -> str:
        status = anthropic.status_of(failure.status, failure.error, failure.headers)
        return _events(self._builder.fail(status, failure.error.message))


class WholeMessage(MessageEvents):
    media_type: ClassVar[str] = "application/json"
    heartbeat: ClassVar[str] = ""

    def push(self, index: int, delta: Delta) -> str:
        self._builder.push(delta)
        return ""

    def end(self) -> str:
        self._builder.end()
        return _json(self._builder.message)


def message_writer(builder: MessageBuilder, *, stream: bool) -> AnswerWriter:
    return (MessageEvents if stream else WholeMessage)(builder)


def _logprobs(delta: Delta) -> list[dict[str, Any]]:
    logprobs = chat_logprobs(delta.logprobs)
    return [] if logprobs is None else [token.model_dump() for token in logprobs.content]


def _code(failure: Failure) -> str:
    """Find OpenAI's code of a response's error."""
    if failure.status == 429:
        return "rate_limit_exceeded"
    return "invalid_prompt" if failure.status < 500 else "server_error"


def _events(events: list[Event]) -> str:
    return "".join(f"event: {e['type']}\ndata: {_json(e)}\n\n" for e in events)


def _json(value: Event | str) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class WholeEmbeddings:
    """Writes the body of embeddings, each of which is a delta's text as `EmbeddingText` writes it."""

    media_type: ClassVar[str] = "application/json"
    heartbeat: ClassVar[str] = ""

    def __init__(self, model: str, num_inputs: int) -> None:
        self._model = model
        self._written = [""] * num_inputs
        self._num_tokens = 0

    def push(self, index: int, delta: Delta) -> str:
        self._written[index] = delta.text
        self._num_tokens += delta.num_prompt_tokens
        return ""

    def end(self) -> str:
        usage = f'{{"prompt_tokens":{self._num_tokens},"total_tokens":{self._num_tokens}}}'
        rows = (f'{{"object":"embedding","index":{i},"embedding":{text}}}' for i, text in enumerate(self._written))
        return f'{{"object":"list","data":[{",".join(rows)}],"model":{_json(self._model)},"usage":{usage}}}'

    def failed(self, failure: Failure) -> str:
        return failure.body


class EmbeddingText:
    """Writes an embedding as JSON: its numbers, with as many digits as tell floats of four bytes apart, or base64."""

    def __init__(self, request: GenerateRequest, encoding: Literal["float", "base64"]) -> None:
        self._num_tokens, self._encoding = len(request.prompt_ids), encoding

    def push(self, tokens: TokenDelta) -> Delta:
        vector = tokens.embedding or ()
        if self._encoding == "base64":
            text = f'"{b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()}"'
        else:
            text = f"[{','.join([f'{x:.9g}' for x in vector])}]"
        return Delta(text, (), None, tokens.finish_reason, self._num_tokens, 0, tokens.num_cached_tokens)


class Echo:
    """Writes a request's text, with the prompt's text and logprobs before the first delta.

    `prompt` returns the text. It is called after the engine has accepted the prompt, because token ids may be invalid.
    """

    def __init__(self, text: RequestText, prompt: Callable[[], str], request: CompletionRequest) -> None:
        self._text, self._prompt, self._request = text, prompt, request
        self._is_first = True

    def push(self, tokens: TokenDelta) -> Delta:
        delta = self._text.push(tokens)
        if not self._is_first:
            return delta
        self._is_first = False
        return _with_prompt(delta, self._prompt(), self._request)


def _with_prompt(delta: Delta, prompt: str, request: CompletionRequest) -> Delta:
    """Prepend the prompt, with as many most likely tokens as each of `logprobs` and `prompt_logprobs` requests.

    The engine returns as many as the larger of the two requests.
    """
    prompt_logprobs = delta.prompt_logprobs or ()
    logprobs = delta.logprobs
    if request.logprobs is not None:
        logprobs = (*_best(prompt_logprobs, request.logprobs), *(logprobs or ()))
    num_top = request.prompt_logprobs
    return delta._replace(
        text=prompt + delta.text,
        logprobs=logprobs,
        prompt_logprobs=None if num_top is None else _best(prompt_logprobs, num_top),
    )


def _best(logprobs: tuple[TokenLogprob, ...], num_top: int) -> tuple[TokenLogprob, ...]:
    return tuple(lp._replace(top=lp.top[:num_top]) for lp in logprobs)
