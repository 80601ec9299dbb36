"""Requests of Anthropic's Messages API, and the chat requests that they stand for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from loray.errors import RequestError, ThreadsUnsupported, shown
from loray.schemas.openai.fields import Body, ShortText, SmallObject, parse
from loray.schemas.openai.requests import ChatCompletionRequest

MIN_THINKING_TOKENS = 1024
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_ROLES = ("user", "assistant", "system")
# A block with which a coding agent begins its system prompt, another one in each request: it says nothing to the model,
# and no two prompts would have a prefix in common.
_BILLING = "x-anthropic-billing-header:"

# -- messages ---------------------------------------------------------------------------------------------------------

Message = dict[str, Any]


def messages(system: str | Sequence[Any] | None, given: Sequence[Any]) -> list[Message]:
    """The chat's messages. Turns of one role that follow each other are one, as Anthropic has it."""
    chat: list[Message] = []
    if system is not None:
        parts = [part for part in _texts(system, "system") if not part["text"].startswith(_BILLING)]
        if parts:
            chat.append({"role": "system", "content": parts})
    for i, message in enumerate(given):
        at = f"messages.{i}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _ROLES:
            raise RequestError(f"{at}.role: must be one of {', '.join(_ROLES)}, not {shown(role)}", f"{at}.role")
        if role == "assistant":
            _append_assistant(chat, message, f"{at}.content")
        else:
            _append_user(chat, role, message, f"{at}.content")
    for turn in chat:
        turn["content"] = turn["content"] or (None if "tool_calls" in turn else "")
    return chat


def _append_user(chat: list[Message], role: str, message: Mapping[str, Any], at: str) -> None:
    for kind, block, where in _blocks(message, at):
        if kind == "text":
            _turn(chat, role)["content"].append(_text_part(block, where))
        elif kind == "tool_result" and role == "user":
            call_id = _string(block, "tool_use_id", where)
            given = block.get("content")
            parts = [] if given is None else _texts(given, f"{where}.content")
            if block.get("is_error"):  # a chat's messages have no field for it
                parts.insert(0, {"type": "text", "text": "Error:"})
            chat.append({"role": "tool", "tool_call_id": call_id, "content": parts})
        else:
            raise _unsupported(kind, where)


def _append_assistant(chat: list[Message], message: Mapping[str, Any], at: str) -> None:
    turn = _turn(chat, "assistant")
    for kind, block, where in _blocks(message, at):
        if kind == "text":
            turn["content"].append(_text_part(block, where))
        elif kind == "thinking":
            turn["reasoning_content"] = turn.get("reasoning_content", "") + _string(block, "thinking", where)
        elif kind == "tool_use":
            arguments = block.get("input")
            if not isinstance(arguments, dict):
                raise RequestError(f"{where}.input: must be an object", f"{where}.input")
            written = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
            function = {"name": _string(block, "name", where), "arguments": written}
            call = {"id": _string(block, "id", where), "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)
        elif kind != "redacted_thinking":  # which only Anthropic can read
            raise _unsupported(kind, where)


def _turn(chat: list[Message], role: str) -> Message:
    """The last message, if it is of this role, else a new one."""
    if not chat or chat[-1]["role"] != role:
        chat.append({"role": role, "content": []})
    return chat[-1]


def _blocks(message: Mapping[str, Any], at: str) -> Iterator[tuple[object, dict[str, Any], str]]:
    """Each block of a message's content with its type and its place. A text is one block."""
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RequestError(f"{at}: must be a string or a list of blocks", at)
    for i, block in enumerate(content):
        if not isinstance(block, dict):
            raise RequestError(f"{at}.{i}: must be an object with a type", f"{at}.{i}")
        yield block.get("type"), block, f"{at}.{i}"


def _texts(value: object, at: str) -> list[dict[str, str]]:
    """The text parts of a chat for a text, or for blocks of which each is one."""
    parts = []
    for kind, block, where in _blocks({"content": value}, at):
        if kind != "text":
            raise _unsupported(kind, where)
        parts.append(_text_part(block, where))
    return parts


def _text_part(block: Mapping[str, Any], at: str) -> dict[str, str]:
    return {"type": "text", "text": _string(block, "text", at)}


def _string(block: Mapping[str, Any], field: str, at: str) -> str:
    value = block.get(field)
    if not isinstance(value, str):
        raise RequestError(f"{at}.{field}: must be a string", f"{at}.{field}")
    return value


def _unsupported(kind: object, at: str) -> RequestError:
    return RequestError(f"{at}: a block of type {shown(kind)} is not supported here; send its text in a text block", at)


# -- tools ------------------------------------------------------------------------------------------------------------


def _tool(tool: object, at: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise RequestError(f"{at}: must be an object", at)
    kind = tool.get("type") or "custom"
    if kind != "custom":
        raise RequestError(
            f"{at}: tools of type {shown(kind)} are not supported, which Anthropic's servers run or its models were "
            "trained for; give a tool with a name and an input_schema",
            at,
        )
    if not isinstance(tool.get("input_schema"), dict):
        raise RequestError(f"{at}.input_schema: must be the JSON schema of the tool's input", f"{at}.input_schema")
    function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
    return {"type": "function", "function": function | {k: tool.get(k) for k in ("description", "strict")}}


class ToolChoiceForm(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: ShortText | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.name is not None) != (self.type == "tool"):
            raise RequestError('name belongs to {"type": "tool"}, which needs it')
        return self

    def chat_fields(self) -> dict[str, Any]:
        named = {"type": "function", "function": {"name": self.name}}
        choice: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none", "tool": named}
        return {"tool_choice": choice[self.type], "parallel_tool_calls": not self.disable_parallel_tool_use}


# -- the request ------------------------------------------------------------------------------------------------------


class Thinking(Body):
    """`adaptive` and `between_tools` leave it to the model, as a request without `thinking` does."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(default=None, description="of enabled: the most tokens of the thought")
    display: Literal["summarized", "omitted"] | None = Field(
        default=None, description="omitted: the answer has the thought's signature alone"
    )

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if (self.budget_tokens is not None) != (self.type == "enabled"):
            raise RequestError('budget_tokens belongs to {"type": "enabled"}, which needs it')
        if self.budget_tokens is not None and self.budget_tokens < MIN_THINKING_TOKENS:
            raise RequestError(f"budget_tokens must be at least {MIN_THINKING_TOKENS:,}")
        return self

    @property
    def template_variables(self) -> dict[str, bool]:
        return {"enable_thinking": self.type == "enabled"} if self.type in ("enabled", "disabled") else {}


class JsonFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    format: JsonFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


_REFUSED = {
    "compaction": "ask for a summary in a message",
    "container": "nothing is run here",
    "mcp_servers": "the client asks MCP servers; give their tools in `tools`",
    "output_format": "use output_config.format",
}
_NAMES_HERE = {  # fields of chat completions that have another name or form here
    "max_completion_tokens": "max_tokens",
    "n": "several requests",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking.budget_tokens",
}
# Fields of chat completions for which a message has no place.
_NO_PLACE = ("logprobs", "top_logprobs", "prompt_logprobs", "return_token_ids", "stream_options", "include_reasoning")
# Of Anthropic's service, which change nothing here: its caches, places, prices and the clearing of old tool results.
_HINTS = (
    "betas",
    "billing_policy",
    "cache_control",
    "context_management",
    "diagnostics",
    "fallback_credit_token",
    "fallbacks",
    "inference_geo",
    "service_tier",
    "speed",
    "user_profile_id",
    "workspace_id",
)


class CountTokensRequest(Body):
    """POST /v1/messages/count_tokens. Further fields are those of a chat: `chat_template_kwargs` and others."""

    model_config = ConfigDict(extra="allow")
    also_known = ChatCompletionRequest.known | _REFUSED.keys() | _NAMES_HERE.keys() | {*_NO_PLACE, *_HINTS, "thread"}

    model: ShortText = Field(min_length=1)
    messages: list[Any] = Field(description="turns of user and assistant, the last of which is continued if it is last")
    system: str | list[Any] | None = Field(default=None, description="a text or text blocks")
    tools: list[Any] = Field(default=[], description="with a name and an input_schema")
    tool_choice: ToolChoiceForm | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def chat_body(self) -> dict[str, Any]:
        """The body of the chat request. Raises RequestError for what a chat cannot say."""
        extra = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        if "thread" in extra:
            raise ThreadsUnsupported("thread: nothing is stored here; send the conversation in `messages`", "thread")
        for name in extra:
            if name in _REFUSED and extra[name]:
                raise RequestError(f"{name} is not supported: {_REFUSED[name]}", name)
            if name in _NAMES_HERE:
                raise RequestError(f"{name} is a field of chat completions; use {_NAMES_HERE[name]}", name)
            if name in _NO_PLACE:
                raise RequestError(f"{name} is not supported: a message has no place for it", name)
        body = {name: value for name, value in extra.items() if name not in _REFUSED and name not in _HINTS}
        body |= {"model": self.model, "messages": messages(self.system, self.messages)}
        last = body["messages"][-1] if body["messages"] else {}
        if last.get("role") == "assistant":
            if "tool_calls" in last:
                raise RequestError("messages: the last tool_use has no tool_result; send it in a turn of the user")
            body.setdefault("continue_final_message", True)
        if self.tools:
            body["tools"] = [_tool(tool, f"tools.{i}") for i, tool in enumerate(self.tools)]
        if self.tool_choice is not None:
            body |= self.tool_choice.chat_fields()
        return body | self._thinking(extra) | self._output()

    def _thinking(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        if self.thinking is None:
            return {}
        budget = self.thinking.budget_tokens
        variables, given = self.thinking.template_variables, extra.get("chat_template_kwargs", {})
        # What is no object stays as it is, and the chat refuses it.
        fields = {"chat_template_kwargs": variables | given} if variables and isinstance(given, dict) else {}
        return fields if budget is None else fields | {"thinking_token_budget": budget}

    def _output(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        config = self.output_config or OutputConfig()
        if config.format is not None:
            schema = {"name": "output", "schema": config.format.schema_, "strict": True}
            out["response_format"] = {"type": "json_schema", "json_schema": schema}
        if config.effort is not None:
            out["reasoning_effort"] = _EFFORTS[config.effort]
        return out


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages. Further fields are those of a chat: `seed`, `min_p`, `priority` and others."""

    max_tokens: int = Field(ge=1, description="at most; an answer ends earlier where the context does")
    stop_sequences: tuple[str, ...] = Field(default=(), strict=False)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    top_k: int = Field(default=0, ge=-1, description="0 or -1: off")
    metadata: SmallObject | None = Field(default=None, description="user_id, as `user` of a chat")
    stream: bool = False

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> Self:
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            raise RequestError(
                f"thinking.budget_tokens must be less than max_tokens, {self.max_tokens:,}", "thinking.budget_tokens"
            )
        return self

    def chat_body(self) -> dict[str, Any]:
        body = super().chat_body() | {"max_completion_tokens": self.max_tokens, "stream": self.stream}
        body |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.stop_sequences:
            body["stop"] = list(self.stop_sequences)
        user = (self.metadata or {}).get("user_id")
        if isinstance(user, str):
            body["user"] = user
        return body

    def shows_arguments_early(self, name: str) -> bool:
        """Tell whether the arguments of a call are streamed as they are written: they are sure to be JSON, or the tool
        asks for it.
        """
        is_sure = self.tool_choice is not None and self.tool_choice.type in ("any", "tool")
        return is_sure or any(
            tool.get("strict") or tool.get("eager_input_streaming") for tool in self.tools if tool.get("name") == name
        )


class MessageChat(ChatCompletionRequest):
    """The chat request of a message, whose limit is an upper bound: an answer may end where the context does."""

    @property
    def requested_max_tokens(self) -> None:
        return None

    @property
    def default_max_tokens(self) -> int | None:
        return self.max_completion_tokens


def chat_request(request: CountTokensRequest) -> ChatCompletionRequest:
    """The chat request that `request` stands for. Raises RequestError."""
    body = request.chat_body()
    try:
        return parse(MessageChat, body)
    except RequestError as e:
        param = e.param or ""
        here = _NAMES_HERE.get(param.partition(".")[0], param)
        raise type(e)(f"{here}{str(e).removeprefix(param)}" if str(e).startswith(param) else str(e), here) from e
