"""Bodies of OpenAI's requests: completions, and chat completions with their messages and tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, FailFast, Field, PlainValidator, ValidationError, model_validator

from loray.errors import RequestError, shown
from loray.schemas.openai import fields
from loray.schemas.openai.fields import (
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_DESCRIPTION,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    NO_AUDIO,
    NO_FUNCTIONS,
    Body,
    Hints,
    Prompt,
    PromptForms,
    ShortText,
)
from loray.schemas.openai.structured import JsonSchema, StructuredFields
from loray.spec import Constraint, SamplingParams, Thinking, Tool, ToolUse

# -- messages ---------------------------------------------------------------------------------------------------------

# Keys of messages that change no prompt: what answers have and clients send back, and hints of other providers' APIs.
_IGNORED = ("annotations", "cache_control", "provider_specific_fields", "refusal")
_REASONING = ("reasoning_content", "reasoning")  # two names of the same text


class CalledFunction(Body):
    name: Annotated[fields.ShortText, Field(min_length=1)]
    arguments: str = Field(default="{}", description="JSON in a string, as the model wrote it")


class RequestToolCall(Body):
    """A call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    @model_validator(mode="before")
    @classmethod
    def _without_index(cls, value: Any) -> Any:
        """The call without the `index` of a stream, which clients keep that have joined its chunks."""
        return {k: v for k, v in value.items() if k not in ("index", *_IGNORED)} if isinstance(value, dict) else value

    def for_template(self) -> dict[str, Any]:
        """The call with arguments as an object, which most templates expect. What is not JSON stays the text it was."""
        arguments: Any = self.function.arguments
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}")
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(fields.text)] = Field(default="", description="text, or text parts")
    name: str | None = None
    tool_calls: tuple[RequestToolCall, ...] = Field(default=(), strict=False, description="of an assistant")
    tool_call_id: str | None = Field(default=None, description="of a tool: the call that it answers")
    reasoning: str = Field(default="", description="of an assistant: what it thought, also as reasoning_content")

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: Any) -> Any:
        """The message without null and empty fields, with which clients send an assistant's message back. Reasoning
        that is no text, or another's than an assistant's, is dropped as well.
        """
        if not isinstance(value, dict):
            return value
        if value.get("audio"):
            raise RequestError(f"audio is not supported: {NO_AUDIO}")
        if value.get("function_call") or value.get("role") == "function":
            raise RequestError(f"function_call is not supported: {NO_FUNCTIONS}")
        dropped = ("audio", "function_call", *_REASONING, *_IGNORED)
        message = {k: v for k, v in value.items() if v is not None and k not in dropped}
        thoughts = [value[k] for k in _REASONING if isinstance(value.get(k), str) and value[k]]
        return message | {"reasoning": thoughts[0]} if thoughts and value.get("role") == "assistant" else message

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """Refuse a message without the fields that its role needs, or with those of another one."""
        if self.role == "tool" and self.tool_call_id is None:
            raise RequestError("a message of role tool needs tool_call_id: the id of the call that it answers")
        if self.tool_calls and self.role != "assistant":
            raise RequestError(f"only an assistant's message has tool_calls, this one's role is {self.role}")
        if "content" not in self.model_fields_set and not (self.tool_calls or self.reasoning):
            raise RequestError("content is required, but for an assistant's message with tool_calls or reasoning")
        return self

    @property
    def num_characters(self) -> int:
        """Characters of all that the chat template can read of the message."""
        calls = sum(len(c.id) + len(c.function.name) + len(c.function.arguments) for c in self.tool_calls)
        return len(self.content) + len(self.reasoning) + len(self.name or "") + len(self.tool_call_id or "") + calls

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it; `developer` is OpenAI's newer name for `system`."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
        }
        if self.name:
            message["name"] = self.name
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
        return message


def for_template(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as chat templates expect them; a tool's gets the name of the function that was called."""
    out, names = [], dict[str | None, str]()
    for message in messages:
        names |= {call.id: call.function.name for call in message.tool_calls}
        written = message.for_template()
        if message.role == "tool" and message.tool_call_id in names:
            written.setdefault("name", names[message.tool_call_id])
        out.append(written)
    return out


# -- tools ------------------------------------------------------------------------------------------------------------

MAX_TOOLS = 128
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_HARMLESS = ("cache_control", "defer_loading", "eager_input_streaming")  # of other providers' APIs


def tool_of(value: object) -> object:
    """One of `tools`, without fields that change nothing. Raises RequestError for a tool of another type."""
    if not isinstance(value, dict):
        return value
    kind = value.get("type", "function")
    if kind != "function":
        raise RequestError(f'tools of type {shown(kind)} are not supported; only {{"type": "function"}} is')
    return {k: v for k, v in value.items() if k not in _HARMLESS}


def _present(value: object) -> object:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class FunctionDefinition(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION)] | None = None
    parameters: JsonSchema = Field(default=_NO_PARAMETERS, description="the JSON schema of the arguments")
    strict: bool = Field(default=False, description="the arguments are valid by `parameters`")


class FunctionTool(Body):
    type: Literal["function"] = "function"
    function: Annotated[FunctionDefinition, BeforeValidator(_present)]

    def to_tool(self) -> Tool:
        f = self.function
        if not isinstance(f.parameters, dict):
            raise RequestError(f"the parameters of {f.name} must be a JSON schema of an object", "tools")
        return Tool(f.name, f.parameters or _NO_PARAMETERS, f.description, f.strict)


class FunctionName(Body):
    name: ShortText


class NamedChoice(Body):
    """The function that the answer must call."""

    type: Literal["function"] = "function"
    function: FunctionName


class AllowedSet(Body):
    mode: Literal["auto", "required"]
    tools: tuple[NamedChoice, ...] = Field(strict=False, max_length=MAX_TOOLS)


class AllowedTools(Body):
    """Some of the tools, of which the model may (auto) or must (required) call; it is shown no others."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedSet

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool.function.name for tool in self.allowed_tools.tools)


ToolChoice = Literal["none", "auto", "required"] | NamedChoice | AllowedTools
_CHOICES: dict[str, type[Body]] = {"function": NamedChoice, "allowed_tools": AllowedTools}


def choice_of(value: object) -> object:
    """`tool_choice` as one of its forms. Raises RequestError, the same for all that it may not be."""
    if value in ("none", "auto", "required"):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    with suppress(ValidationError):
        if isinstance(kind, str) and kind in _CHOICES:
            return _CHOICES[kind].model_validate(value)
    form = '{"type": "function", "function": {"name": ...}}'
    raise RequestError(f"must be none, auto, required, {form}, or allowed_tools with a mode and such tools")


def tool_use(tools: Sequence[FunctionTool], choice: ToolChoice, parallel: bool) -> ToolUse | None:
    """The tools that a request offers; None where nothing is to be called. Raises RequestError where the fields
    contradict.
    """
    names = [tool.function.name for tool in tools]
    if isinstance(choice, AllowedTools):
        unknown = [name for name in choice.names if name not in names]
        if unknown:
            raise RequestError(f"tool_choice allows {shown(unknown[0])}, which is no tool", "tool_choice")
        allowed = [tool for tool in tools if tool.function.name in choice.names]
        return tool_use(allowed, choice.allowed_tools.mode, parallel)
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise RequestError(f"two tools are called {twice!r}", "tools")
    named = isinstance(choice, NamedChoice)
    name = choice.function.name if isinstance(choice, NamedChoice) else choice
    if not tools and (named or name == "required"):
        raise RequestError("tool_choice asks for a call, but the request has no tools", "tool_choice")
    if named and name not in names:
        raise RequestError(f"tool_choice names {shown(name)}; the tools are {', '.join(names)}", "tool_choice")
    if not tools or (name == "none" and not named):
        return None
    return ToolUse(tuple(tool.to_tool() for tool in tools), name, parallel, named)


# -- requests ---------------------------------------------------------------------------------------------------------

MAX_LOGPROBS = 20
ENABLE_THINKING = "enable_thinking"  # the variable by which templates of reasoning models open a thought or none
_NO_VARIABLES = {"add_generation_prompt", "chat_template", "continue_final_message", "documents", "messages", "tools"}
_ONLY_THE_BEST = 1e-9  # a top_p that only the most likely token reaches
_NO_THOUGHT = ("none", "minimal")  # of reasoning_effort
_BUDGETS = {"low": 1024, "medium": 8192}  # tokens of a thought, by reasoning_effort; any other has no budget


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = Field(default=False, description="accepted; chunks are never padded")
    continuous_usage_stats: bool = Field(default=False, description="with include_usage: usage in every chunk")


class GenerationRequest(Hints, StructuredFields):
    """The fields of both endpoints."""

    also_known = fields.UNSUPPORTED

    model: Annotated[ShortText, Field(min_length=1)]
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1, description="0: only the most likely token")
    top_k: int = Field(default=0, ge=-1, description="0 or -1: off")
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100, description="over prompt and answer; 1: off")
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(fields.bias)] = Field(
        default_factory=dict, description="token id to what is added to its logit"
    )
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(default=None, description="n, or nothing")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[tuple[str, ...], BeforeValidator(fields.stop_strings), Field(max_length=MAX_STOP_STRINGS)] = ()
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(fields.stop_tokens)] = Field(
        default=(), max_length=MAX_STOP_TOKENS
    )
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    allowed_token_ids: Annotated[tuple[int, ...], BeforeValidator(fields.token_ids), Field(min_length=1)] | None = None
    bad_words: Annotated[tuple[str, ...], BeforeValidator(fields.bad_words), Field(max_length=MAX_BAD_WORDS)] = ()
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=-1, description="of a longer prompt the last so many; -1: as many as leave room for max_tokens"
    )
    return_token_ids: bool = Field(default=False, description="those of prompt and answer, as in vLLM")
    return_tokens_as_token_ids: bool = Field(default=False, description="the texts of logprobs are `token_id:5`")
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = Field(default=0, description="smaller is earlier; below 0 needs a key that may")
    ttft_slo_s: float | None = Field(default=None, gt=0, description="refused if its first token cannot come in time")
    cache_salt: str | None = Field(
        default=None, min_length=1, max_length=256, description="cached prefixes are shared with the same salt alone"
    )
    user: ShortText | None = Field(default=None, description="whose share it takes, where X-Tenant-Id does not say it")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream: true", "stream_options")
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError("best_of is not supported; ask for n choices and choose yourself", "best_of")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs is not supported with stream: true", "prompt_logprobs")
        if self.truncate_prompt_tokens == 0:
            raise RequestError("truncate_prompt_tokens must be -1 or at least 1", "truncate_prompt_tokens")
        limit = self.default_max_tokens if self.requested_max_tokens is None else self.requested_max_tokens
        if limit is not None and self.min_tokens > limit:
            raise RequestError(f"min_tokens is more than max_tokens, {limit}", "min_tokens")
        _ = self.constraint  # RequestError where several are given
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Number of most likely tokens to return per token of the prompt; None: no logprobs of the prompt at all."""
        return self.prompt_logprobs

    @property
    def requested_max_tokens(self) -> int | None:
        """The client's limit; None: `default_max_tokens`, as far as it fits into the context."""
        raise NotImplementedError

    @property
    def default_max_tokens(self) -> int | None:
        """The limit where the client gives none; None: the rest of the context."""
        return None

    def sampling(
        self,
        *,
        max_tokens: int,
        choice: int,
        bad_words: tuple[tuple[int, ...], ...] = (),
        structured: Constraint | None = None,
        thinking: Thinking | None = None,
    ) -> SamplingParams:
        """The parameters of choice number `choice` of a prompt. If a seed is given, choice i is drawn with seed + i.

        bad_words   the tokens of the request's
        structured  what the answer must match, where tools make more of it than `constraint` says
        thinking    the thought before the answer; the engine is told of it where it has something to do with it
        """
        structured = structured or (None if self.constraint is None else self.constraint.constraint)
        if thinking is not None and (thinking.state == "over" or (structured is None and thinking.budget is None)):
            thinking = None
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p or _ONLY_THE_BEST,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            seed=None if self.seed is None else self.seed + choice,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
            structured=structured,
            thinking=thinking,
            allowed_token_ids=self.allowed_token_ids,
            bad_words=bad_words,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(fields.prompts, json_schema_input_type=PromptForms)]
    add_special_tokens: bool = Field(default=True, description="what the tokenizer puts around a text")
    max_tokens: int | None = Field(default=None, ge=0, description="16 unless given; 0: only the prompt")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = Field(default=False, description="the prompt first, with its own logprobs where they are asked for")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise RequestError(
                f"{len(self.prompt)} prompts × n={self.n} are {len(self.prompt) * self.n} choices; "
                f"at most {MAX_CHOICES} in one request",
                "prompt",
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        requested = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((n for n in requested if n is not None), default=None)

    @property
    def requested_max_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def default_max_tokens(self) -> int:
        return 16


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions. Without a limit, generation may fill the rest of the context."""

    messages: Annotated[tuple[ChatMessage, ...], Field(strict=False), FailFast()]
    tools: Annotated[
        tuple[Annotated[FunctionTool, BeforeValidator(tool_of)], ...],
        Field(strict=False, max_length=MAX_TOOLS),
        FailFast(),
    ] = ()
    tool_choice: Annotated[ToolChoice, BeforeValidator(choice_of)] = Field(
        default="auto", description="required and a named function: the answer is calls, with valid arguments"
    )
    parallel_tool_calls: bool = Field(default=True, description="false: at most one call in an answer")
    chat_template_kwargs: fields.SmallObject = Field(default_factory=dict, description="variables of the chat template")
    add_generation_prompt: bool | None = Field(default=None, description="true, but with continue_final_message")
    continue_final_message: bool = Field(default=False, description="the answer continues the last message")
    add_special_tokens: bool = Field(default=False, description="beside those of the chat template")
    reasoning_effort: fields.ShortText | None = Field(
        default=None, description="none and minimal: no thought; low and medium: one of at most 1,024 and 8,192 tokens"
    )
    thinking_token_budget: int | None = Field(default=None, ge=0, description="tokens of a thought, which then ends")
    include_reasoning: bool | None = Field(default=None, description="false: the answer leaves out what was thought")
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if not self.messages:
            raise RequestError("messages is empty; give at least one", "messages")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs: true", "top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise RequestError("max_tokens and max_completion_tokens differ; give one", "max_tokens")
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError("give either continue_final_message or add_generation_prompt", "continue_final_message")
        reserved = sorted(_NO_VARIABLES & self.chat_template_kwargs.keys())
        if reserved:
            raise RequestError(
                f"chat_template_kwargs cannot set {', '.join(reserved)}; that is what the request's own fields are for",
                "chat_template_kwargs",
            )
        _ = self.tool_use  # RequestError where the fields contradict
        _ = self.num_characters  # counted where the body is parsed, for a long one in a thread
        return self

    @cached_property
    def num_characters(self) -> int:
        """Characters of all that the chat template can read."""
        tools = () if self.tool_use is None else self.tool_use.tools
        of_tools = (len(t.name) + len(t.description or "") + fields.num_characters(t.parameters) for t in tools)
        of_messages = sum(message.num_characters for message in self.messages)
        return of_messages + sum(of_tools) + fields.num_characters(self.chat_template_kwargs)

    @cached_property
    def tool_use(self) -> ToolUse | None:
        """The tools that the model may or must call; None: nothing."""
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def template_variables(self) -> dict[str, Any]:
        """The chat template is given these variables. An effort may turn the thought of a reasoning model off."""
        is_off = self.reasoning_effort in _NO_THOUGHT
        return ({ENABLE_THINKING: False} if is_off else {}) | self.chat_template_kwargs

    @property
    def thinking_budget(self) -> int | None:
        """The most tokens of a reasoning model's thought; None: any number."""
        if self.template_variables.get(ENABLE_THINKING) is False:
            return 0
        if self.thinking_token_budget is not None:
            return self.thinking_token_budget
        return _BUDGETS.get(self.reasoning_effort or "")

    @property
    def thinking_fields(self) -> list[str]:
        """The given fields that have no effect on a model that does not think."""
        given = [name for name in ("reasoning_effort", "thinking_token_budget") if getattr(self, name) is not None]
        if ENABLE_THINKING in self.chat_template_kwargs:
            given.append(f"chat_template_kwargs.{ENABLE_THINKING}")
        return given

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def requested_max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens
