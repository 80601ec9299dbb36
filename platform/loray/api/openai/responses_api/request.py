"""The body of POST /v1/responses, and the chat request that it stands for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from loray.api.openai.body import Body, Hints, parse
from loray.api.openai.fields import ShortText, SmallObject
from loray.api.openai.requests import ChatCompletionRequest
from loray.api.openai.responses_api import items
from loray.errors import RequestError, shown

_NOT_STORED = "responses are not stored; send the earlier items in `input`"
_REFUSED = {
    "previous_response_id": _NOT_STORED,
    "conversation": _NOT_STORED,
    "prompt": "prompt templates are not stored; send the prompt in `input`",
    "background": "the answer comes with this request; use stream: true",
}
_CHAT_ONLY = {  # fields of chat completions that have another name or form here
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "logprobs": 'include: ["message.output_text.logprobs"]',
    "n": "several requests",
}
_NAMES = {"messages": "input", "response_format": "text.format", "max_completion_tokens": "max_output_tokens"}
_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (_LOGPROBS, "reasoning.encrypted_content")  # the latter of reasoning that there never is


class TextOptions(Body):
    format: dict[str, Any] | None = Field(default=None, description="text, json_object or json_schema")
    verbosity: ShortText | None = Field(default=None, description="accepted; it changes nothing")


class ResponseStreamOptions(Body):
    include_obfuscation: bool = Field(default=False, description="accepted; events are never padded")


class ResponsesRequest(Hints):
    """POST /v1/responses. Further fields are those of chat completions: `seed`, `top_k`, `priority` and others."""

    model_config = ConfigDict(extra="allow")

    model: ShortText = Field(min_length=1)
    input: str | list[Any] = Field(description="a text, or messages, function calls and their outputs")
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    text: TextOptions = TextOptions()
    tools: list[dict[str, Any]] = Field(default=[], description="functions")
    tool_choice: ShortText | SmallObject | None = None
    parallel_tool_calls: bool = True
    include: tuple[str, ...] = Field(default=(), strict=False)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    truncation: Literal["disabled"] = "disabled"
    reasoning: SmallObject | None = Field(default=None, description="accepted; it changes nothing")
    max_tool_calls: int | None = Field(default=None, description="accepted; it counts tools of the server alone")
    user: ShortText | None = None

    def chat_body(self) -> dict[str, Any]:
        """The body of the chat request. RequestError for what a chat cannot say."""
        extra = dict(self.model_extra or {})
        for name in extra:
            if name in _REFUSED and extra[name] is not False:
                raise RequestError(f"{name} is not supported: {_REFUSED[name]}", name)
            if name in _CHAT_ONLY:
                raise RequestError(f"{name} is a field of chat completions; use {_CHAT_ONLY[name]}", name)
        body = {name: value for name, value in extra.items() if name not in _REFUSED}
        body |= {"model": self.model, "messages": items.messages(self.instructions, self.input)}
        body |= {"temperature": self.temperature, "top_p": self.top_p, "stream": self.stream}
        given = {
            "max_completion_tokens": self.max_output_tokens,
            "response_format": _response_format(self.text.format),
            "user": self.user,
        }
        body |= {name: value for name, value in given.items() if value is not None}
        return body | self._tools() | self._logprobs()

    def _tools(self) -> dict[str, Any]:
        if not self.tools:
            return {}
        tools = [_chat_tool(tool, f"tools.{i}") for i, tool in enumerate(self.tools)]
        choice: Any = self.tool_choice
        if isinstance(choice, dict):
            kind = choice.get("type")
            if kind == "function":
                choice = {"type": "function", "function": {"name": choice.get("name")}}
            elif kind == "allowed_tools":
                names = [t.get("name") for t in choice.get("tools", ()) if isinstance(t, dict)]
                tools = [t for t in tools if t["function"]["name"] in names]
                choice = choice.get("mode", "auto")
            else:
                raise RequestError(f"tool_choice: {shown(kind)} is not supported; only functions are", "tool_choice")
        given = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": self.parallel_tool_calls}
        return {name: value for name, value in given.items() if value is not None}

    def _logprobs(self) -> dict[str, Any]:
        for name in self.include:
            if name not in _INCLUDABLE:
                raise RequestError(f"include: {shown(name)} is not supported; only {_LOGPROBS!r} is", "include")
        if self.top_logprobs is None and _LOGPROBS not in self.include:
            return {}
        return {"logprobs": True, "top_logprobs": self.top_logprobs or 0}


def chat_request(request: ResponsesRequest) -> ChatCompletionRequest:
    """The chat request that `request` stands for. Raises RequestError."""
    try:
        return parse(ChatCompletionRequest, request.chat_body())
    except RequestError as e:
        raise renamed(e) from e


def renamed(error: RequestError) -> RequestError:
    """An error of the chat request, whose `param` is a field of the Responses request."""
    name, dot, rest = (error.param or "").partition(".")
    return type(error)(str(error), f"{_NAMES[name]}{dot}{rest}") if name in _NAMES else error


def _chat_tool(tool: dict[str, Any], at: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(f"{at}: tools of type {shown(tool.get('type'))} are not supported; only functions are", at)
    known = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {k: tool[k] for k in known if tool.get(k) is not None}}


def _response_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if given is None or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {k: v for k, v in given.items() if k != "type" and v is not None}}
