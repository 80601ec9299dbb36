"""Builds OpenAI's responses and chunks from the engine's deltas; one format per endpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from loray.api.openai.chat.tool_calls import assistant_message, chat_delta
from loray.api.openai.extras import NO_EXTRAS, Extras
from loray.api.openai.logprobs import by_token_id, chat_logprobs, completion_logprobs
from loray.api.openai.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
)
from loray.spec import Delta, FinishReason, TokenLogprob, ToolCallDelta


@dataclass
class Choice:
    """One choice of a response, collected from its deltas."""

    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: Sequence[TokenLogprob] | None = None
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, delta: Delta) -> None:
        self.pieces.append(delta.text)
        self.tool_calls += delta.tool_calls
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += delta.logprobs
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = delta.stop_reason
        self.count(delta)

    def count(self, delta: Delta) -> None:
        """Takes only the numbers of tokens, which a stream's usage needs."""
        self.num_prompt_tokens, self.num_output_tokens = delta.num_prompt_tokens, delta.num_output_tokens
        self.num_cached_tokens = delta.num_cached_tokens


def usage_of(choices: Sequence[Choice], num_per_prompt: int) -> Usage:
    """Usage of all choices; a prompt counts once for its `num_per_prompt` choices."""
    prompts = choices[::num_per_prompt]
    return Usage.of(
        sum(c.num_prompt_tokens for c in prompts),
        sum(c.num_output_tokens for c in choices),
        sum(c.num_cached_tokens for c in prompts),
    )


class ResponseFormat(Protocol):
    """Builds an endpoint's responses: one body, or the chunks of a stream."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Completion | ChatCompletion: ...
    def opening(self, index: int) -> Completion | ChatCompletionChunk | None:
        """The chunk that precedes a choice's first text, if the endpoint has one."""

    def chunk(self, index: int, delta: Delta) -> Completion | ChatCompletionChunk: ...
    def usage_chunk(self, usage: Usage) -> Completion | ChatCompletionChunk: ...


@dataclass(frozen=True)
class CompletionFormat:
    id: str
    created: int
    model: str
    fingerprint: str
    include_usage: bool = False
    extras: Extras = NO_EXTRAS
    _offsets: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int), init=False, compare=False)

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Completion:
        written = []
        for i, c in enumerate(choices):
            choice = _with_prompt_logprobs(self._choice(i, c.text, c.logprobs, c.finish_reason), c)
            choice = choice.model_copy(update=self.extras.prompt(i))
            written.append(self.extras.choice(choice, c.token_ids, c.stop_reason))
        return self._body(written, usage, True)

    def opening(self, index: int) -> None:
        return None

    def chunk(self, index: int, delta: Delta) -> Completion:
        choice = self._choice(index, delta.text, delta.logprobs, delta.finish_reason)
        choice = self.extras.choice(choice, delta.token_ids, delta.stop_reason)
        if delta.num_output_tokens == len(delta.token_ids):
            choice = choice.model_copy(update=self.extras.prompt(index))
        return self._body([choice], self.extras.usage_of(index, delta), self.include_usage)

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._body([], usage, True)

    def _body(self, choices: list[CompletionChoice], usage: Usage | None, with_usage: bool) -> Completion:
        body = Completion(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
        )
        return body.model_copy(update={"usage": usage}) if with_usage else body

    def _choice(
        self, index: int, text: str, logprobs: Iterable[TokenLogprob] | None, finish_reason: FinishReason | None
    ) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=None if logprobs is None else self._logprobs(index, list(logprobs)),
            finish_reason=finish_reason,
        )

    def _logprobs(self, index: int, tokens: list[TokenLogprob]) -> CompletionLogprobs:
        offsets = []
        for t in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(t.token)
        return completion_logprobs(tokens, offsets)


@dataclass(frozen=True)
class ChatFormat:
    id: str
    created: int
    model: str
    fingerprint: str
    include_usage: bool = False
    extras: Extras = NO_EXTRAS

    def whole(self, choices: Sequence[Choice], usage: Usage) -> ChatCompletion:
        body = ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=[
                self.extras.choice(
                    ChatChoice(
                        index=i,
                        message=assistant_message(c.text, c.tool_calls),
                        logprobs=chat_logprobs(c.logprobs),
                        finish_reason=c.finish_reason or "stop",
                    ),
                    c.token_ids,
                    c.stop_reason,
                )
                for i, c in enumerate(choices)
            ],
            usage=usage,
        )
        return _with_prompt_logprobs(body.model_copy(update=self.extras.prompt(0)), choices[0])

    def opening(self, index: int) -> ChatCompletionChunk:
        choice = ChatChunkChoice(
            index=index, delta=ChatDelta(role="assistant", content=""), logprobs=None, finish_reason=None
        )
        return self._chunk(choice, self.extras.usage_of(index, None)).model_copy(update=self.extras.prompt(index))

    def chunk(self, index: int, delta: Delta) -> ChatCompletionChunk:
        choice = ChatChunkChoice(
            index=index,
            delta=chat_delta(delta),
            logprobs=chat_logprobs(delta.logprobs),
            finish_reason=delta.finish_reason,
        )
        choice = self.extras.choice(choice, delta.token_ids, delta.stop_reason)
        return self._chunk(choice, self.extras.usage_of(index, delta))

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        return self._body([]).model_copy(update={"usage": usage})

    def _chunk(self, choice: ChatChunkChoice, usage: Usage | None) -> ChatCompletionChunk:
        body = self._body([choice])
        return body.model_copy(update={"usage": usage}) if self.include_usage else body

    def _body(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
        )


B = TypeVar("B", CompletionChoice, ChatCompletion)


def _with_prompt_logprobs(body: B, choice: Choice) -> B:
    """Adds the prompt's logprobs if they were requested, as vLLM does: for each token of the prompt, by token id."""
    if choice.prompt_logprobs is None:
        return body
    return body.model_copy(update={"prompt_logprobs": [by_token_id(t) for t in choice.prompt_logprobs]})
