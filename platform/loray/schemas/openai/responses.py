"""Bodies of OpenAI's answers: responses and chunks, models, errors.

They are written with `exclude_unset`, because OpenAI leaves out some fields (`usage` of a chunk, `role` of a later
delta) and sends others as null. So the gateway sets every field that must appear.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from loray.spec import FinishReason


class ResponseBody(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    def to_json(self) -> str:
        return self.model_dump_json(exclude_unset=True)


class PromptTokensDetails(ResponseBody):
    cached_tokens: int


class CompletionTokensDetails(ResponseBody):
    reasoning_tokens: int


class Usage(ResponseBody):
    """`prompt_tokens_details` is sent, as by vLLM, if part of the prompt was in the prefix cache,
    `completion_tokens_details` if part of the answer is a thought.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0, reasoning_tokens: int = 0) -> Usage:
        usage = cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )
        details: dict[str, ResponseBody] = {}
        if cached_tokens:
            details["prompt_tokens_details"] = PromptTokensDetails(cached_tokens=cached_tokens)
        if reasoning_tokens:
            details["completion_tokens_details"] = CompletionTokensDetails(reasoning_tokens=reasoning_tokens)
        return usage.model_copy(update=details) if details else usage

    @property
    def cached_tokens(self) -> int:
        return 0 if self.prompt_tokens_details is None else self.prompt_tokens_details.cached_tokens

    @property
    def reasoning_tokens(self) -> int:
        details = self.completion_tokens_details
        return 0 if details is None else details.reasoning_tokens


# -- completions: a chunk has the form of a complete response ---------------------------------------------------------
class CompletionLogprobs(ResponseBody):
    """One entry per token. `text_offset` counts characters from the start of the completion, or of the echoed prompt,
    whose first token has no logprob.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(ResponseBody):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(ResponseBody):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: PromptLogprobs | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(ResponseBody):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[CompletionChoice]
    usage: Usage | None = None


# -- chat -------------------------------------------------------------------------------------------------------------
class TopLogprob(ResponseBody):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ResponseBody):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseBody):
    content: list[ChatTokenLogprob]
    refusal: None = None


class FunctionCall(ResponseBody):
    """`arguments` is the JSON that the model wrote, valid only where the request made sure of it."""

    name: str
    arguments: str


class ToolCall(ResponseBody):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(ResponseBody):
    """`content` is null where the model only called tools, or has not come to an end of its thoughts.

    `reasoning` and `reasoning_content` are what it thought, the same text by the names that vLLM's and DeepSeek's
    clients know.
    """

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(ResponseBody):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(ResponseBody):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class FunctionCallDelta(ResponseBody):
    name: str | None = None
    arguments: str | None = None


class ToolCallChunk(ResponseBody):
    """Part of call number `index`: id, type and name come first and once."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class ChatDelta(ResponseBody):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallChunk] | None = None


class ChatChunkChoice(ResponseBody):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(ResponseBody):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


# -- models and errors ------------------------------------------------------------------------------------------------
class Model(ResponseBody):
    """A base, or an adapter by any of its names. The fields from `root` on are vLLM's and loray's.

    root      what the id resolves to now: the base's name, or `name@version`
    parent    the adapter's base
    aliases   alias → version
    weights   alias → version → percent of its requests, where an alias has a canary
    versions  newest first
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None = None
    max_model_len: int
    method: str | None = None
    digest: str | None = None
    aliases: dict[str, int] | None = None
    weights: dict[str, dict[int, int]] | None = None
    versions: list[int] | None = None


class ModelList(ResponseBody):
    """`first_id` and `last_id` are of `data`; `has_more`: a page that begins after `last_id` is not empty."""

    object: Literal["list"]
    data: list[Model]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class Error(ResponseBody):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(ResponseBody):
    error: Error
