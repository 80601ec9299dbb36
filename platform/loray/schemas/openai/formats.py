"""Writers of OpenAI's answers: they make responses and chunks of deltas."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Any, NamedTuple, Protocol, TypeVar

from loray.schemas.openai.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FunctionCall,
    FunctionCallDelta,
    PromptLogprob,
    ToolCall,
    ToolCallChunk,
    TopLogprob,
    Usage,
)
from loray.spec import Delta, FinishReason, TokenLogprob, ToolCallDelta

# -- messages, with thoughts and tool calls ---------------------------------------------------------------------------


def assistant_message(choice: Choice) -> AssistantMessage:
    text, reasoning = choice.text, choice.reasoning
    calls = [
        ToolCall(id=d.id or "", type="function", function=FunctionCall(name=d.name or "", arguments=d.arguments))
        for d in _joined(choice.tool_calls)
    ]
    is_null = not text and bool(calls or choice.num_reasoning_tokens)
    message = AssistantMessage(role="assistant", content=None if is_null else text, refusal=None)
    more: dict[str, Any] = {"reasoning": reasoning, "reasoning_content": reasoning} if reasoning else {}
    if calls:
        more["tool_calls"] = calls
    return message.model_copy(update=more) if more else message


def chat_delta(delta: Delta) -> ChatDelta:
    """The part of a message that a step added. Only a last one may have neither text, thought nor calls."""
    fields: dict[str, object] = {}
    if delta.reasoning:
        fields = {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning}
    if delta.text or not (delta.finish_reason or delta.tool_calls or delta.reasoning):
        fields["content"] = delta.text
    if delta.tool_calls:
        fields["tool_calls"] = [_chunk(d) for d in _joined(delta.tool_calls)]
    return ChatDelta.model_validate(fields)


def _joined(deltas: Iterable[ToolCallDelta]) -> list[ToolCallDelta]:
    """One delta for each call: clients join chunks by index, but not always within one chunk."""
    found: dict[int, ToolCallDelta] = {}
    for d in deltas:
        before = found.get(d.index)
        found[d.index] = d if before is None else replace(before, arguments=before.arguments + d.arguments)
    return list(found.values())


def _chunk(d: ToolCallDelta) -> ToolCallChunk:
    if d.id is None:
        return ToolCallChunk(index=d.index, function=FunctionCallDelta(arguments=d.arguments))
    function = FunctionCallDelta(name=d.name, arguments=d.arguments)
    return ToolCallChunk(index=d.index, id=d.id, type="function", function=function)


# -- what answers may have more ---------------------------------------------------------------------------------------

C = TypeVar("C", CompletionChoice, ChatChoice, ChatChunkChoice)


@dataclass(frozen=True)
class Extras:
    """Fields that one answer has beside OpenAI's.

    prompts    the prompt of each choice; empty if the request asks for nothing of this
    token_ids  `return_token_ids`: those of the prompt and of the answer
    usage      `continuous_usage_stats`: the usage of a choice in each of its chunks
    """

    prompts: Sequence[tuple[int, ...]] = ()
    token_ids: bool = False
    usage: bool = False

    @property
    def any(self) -> bool:
        return self.token_ids or self.usage

    def prompt(self, index: int) -> dict[str, Any]:
        """Fields with the prompt of a choice."""
        return {"prompt_token_ids": list(self.prompts[index])} if self.token_ids else {}

    def usage_of(self, index: int, delta: Delta | None) -> Usage | None:
        """The usage of choice `index` until `delta`; None: before the first."""
        if not self.usage:
            return None
        if delta is None:
            return Usage.of(len(self.prompts[index]), 0)
        return Usage.of(len(self.prompts[index]), delta.num_output_tokens, 0, delta.num_reasoning_tokens)

    def choice(self, choice: C, token_ids: Sequence[int], stop_reason: str | int | None) -> C:
        """The choice with its token ids, and with what stopped it, if that is not the end-of-text token."""
        more: dict[str, Any] = {"token_ids": list(token_ids)} if self.token_ids else {}
        if stop_reason is not None:
            more["stop_reason"] = stop_reason
        return choice.model_copy(update=more) if more else choice


NO_EXTRAS = Extras()

# -- log-probabilities ------------------------------------------------------------------------------------------------

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


def completion_logprobs(tokens: Sequence[TokenLogprob], offsets: list[int]) -> CompletionLogprobs:
    return CompletionLogprobs(
        text_offset=offsets,
        token_logprobs=[None if t.logprob is None else _finite(t.logprob) for t in tokens],
        tokens=[t.token for t in tokens],
        top_logprobs=[None if t.logprob is None else _by_text(t) for t in tokens],
    )


def chat_logprobs(tokens: Iterable[TokenLogprob] | None) -> ChatLogprobs | None:
    if tokens is None:
        return None
    content = [
        ChatTokenLogprob(
            token=t.token,
            logprob=_finite(t.logprob),
            bytes=_utf8(t.token),
            top_logprobs=[
                TopLogprob(token=text, logprob=_finite(logprob), bytes=_utf8(text)) for _, text, logprob in t.top
            ],
        )
        for t in tokens
    ]
    return ChatLogprobs(content=content, refusal=None)


def by_token_id(token: TokenLogprob) -> dict[str, PromptLogprob] | None:
    """One token of a prompt, in vLLM's form: the token itself, then the most likely ones."""
    if token.logprob is None:
        return None
    best = ((t, text, logprob, rank) for rank, (t, text, logprob) in enumerate(token.top, 1))
    return {
        str(t): PromptLogprob(logprob=_finite(logprob), rank=rank, decoded_token=text)
        for t, text, logprob, rank in ((token.token_id, token.token, token.logprob, token.rank), *best)
    }


def _by_text(token: TokenLogprob) -> dict[str, float]:
    """The most likely tokens and the token itself. Of two tokens with the same text, the more likely one counts."""
    out: dict[str, float] = {}
    for text, logprob in [*((text, logprob) for _, text, logprob in token.top), (token.token, token.logprob)]:
        out.setdefault(text, _finite(logprob))
    return out


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else _LOWEST_LOGPROB


def _utf8(text: str) -> list[int]:
    return list(text.encode("utf-8", "surrogatepass"))


# -- responses --------------------------------------------------------------------------------------------------------


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
    thoughts: list[str] = field(default_factory=list)
    num_reasoning_tokens: int = 0

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def reasoning(self) -> str:
        return "".join(self.thoughts)

    def add(self, delta: Delta) -> None:
        self.pieces.append(delta.text)
        self.thoughts.append(delta.reasoning)
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
        self.num_cached_tokens, self.num_reasoning_tokens = delta.num_cached_tokens, delta.num_reasoning_tokens


def usage_of(choices: Sequence[Choice], num_per_prompt: int) -> Usage:
    """Usage of all choices; a prompt counts once for its `num_per_prompt` choices."""
    prompts = choices[::num_per_prompt]
    return Usage.of(
        sum(c.num_prompt_tokens for c in prompts),
        sum(c.num_output_tokens for c in choices),
        sum(c.num_cached_tokens for c in prompts),
        sum(c.num_reasoning_tokens for c in choices),
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
                        message=assistant_message(c),
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


# -- chunks -----------------------------------------------------------------------------------------------------------

# What stands in a sample chunk for the values of one request.
_ID, _MODEL, _FINGERPRINT, _TEXT = "@id", "@model", "@fingerprint", "@text"
_JSON_TEXT = encode_basestring(_TEXT)
_CREATED, _INDEX = 10**17 + 1, 10**17 + 2


Template = Sequence[str]  # a chunk is these, with its text as a JSON string between them


class Chunks:
    """A writer of one stream's chunks, each between `before` and `after`. They are those of the format, byte for byte.

    Chunks with log-probabilities, calls of tools or extras are rare, and the format itself writes them.
    """

    def __init__(self, answer: CompletionFormat | ChatFormat, before: str = "", after: str = "") -> None:
        self._answer, self._before, self._after = answer, before, after
        self._shape = replace(
            answer, id=_ID, created=_CREATED, model=_MODEL, fingerprint=_FINGERPRINT, extras=NO_EXTRAS
        )
        self._has_extras = answer.extras.any
        self._plain: dict[int, Template] = {}  # by choice: chunks of text before the last
        self._thoughts: dict[int, Template] = {}  # the same of reasoning

    def push(self, index: int, delta: Delta) -> str:
        """The chunks of a delta of choice `index`: none, one, or more with the choice's first and with the last of a
        thought, which no chunk has beside text or calls: some clients read one of both alone.
        """
        plain = self._plain.get(index)
        opening = ""
        if plain is None:
            plain = self._plain[index] = self._template(index, _PLAIN)
            if (first := self._answer.opening(index)) is not None:
                opening = f"{self._before}{first.to_json()}{self._after}"
        has_more = delta.finish_reason or delta.logprobs or self._has_extras
        if delta.reasoning and (delta.text or delta.tool_calls or not has_more):
            thought = self._thoughts.get(index)
            if thought is None:
                thought = self._thoughts[index] = self._template(index, _THOUGHT)
            opening += encode_basestring(delta.reasoning).join(thought)
            delta = delta._replace(reasoning="")
        if not (delta.text or delta.tool_calls or has_more):
            return opening
        is_plain = not (delta.reasoning or delta.tool_calls or self._has_extras)
        if not is_plain or delta.logprobs is not None or delta.stop_reason is not None:
            return f"{opening}{self._before}{self._answer.chunk(index, delta).to_json()}{self._after}"
        if delta.finish_reason is not None:
            plain = self._template(index, _Kind(delta.finish_reason, bool(delta.text)))
        return opening + encode_basestring(delta.text).join(plain)

    def _template(self, index: int, kind: _Kind) -> Template:
        head, *tail = _sample(self._shape, kind)
        answer = self._answer
        for mark, value in (
            (f'"{_ID}"', encode_basestring(answer.id)),
            (str(_CREATED), str(answer.created)),
            (str(_INDEX), str(index)),
            (f'"{_FINGERPRINT}"', encode_basestring(answer.fingerprint)),
            (f'"{_MODEL}"', encode_basestring(answer.model)),  # last: it is the client's, and may contain a mark
        ):
            head = head.replace(mark, value, 1)
        parts = [f"{self._before}{head}", *tail]
        parts[-1] += self._after
        return parts


class _Kind(NamedTuple):
    finish_reason: FinishReason | None = None
    has_text: bool = False
    has_thought: bool = False


_PLAIN, _THOUGHT = _Kind(has_text=True), _Kind(has_thought=True)


@lru_cache(maxsize=64)
def _sample(shape: CompletionFormat | ChatFormat, kind: _Kind) -> Template:
    delta = Delta(_TEXT if kind.has_text else "", (), None, kind.finish_reason, 0, 0)
    if kind.has_thought:
        delta = delta._replace(reasoning=_TEXT)
    return shape.chunk(_INDEX, delta).to_json().split(_JSON_TEXT)
