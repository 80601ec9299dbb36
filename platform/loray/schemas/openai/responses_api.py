"""OpenAI's Responses API, /v1/responses, as another form of chat completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field

from loray.errors import RequestError, UnsupportedParameter, shown
from loray.schemas.openai.fields import Body, Hints, ShortText, SmallObject, parse
from loray.schemas.openai.requests import ChatCompletionRequest
from loray.schemas.openai.responses import Usage

# -- items as messages ------------------------------------------------------------------------------------------------

Message = dict[str, Any]
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # part → its field


def messages(instructions: str | None, given: str | Sequence[object]) -> list[Message]:
    """The chat's messages, `instructions` first. `given` is a text of the user, or items. Reasoning belongs to the
    assistant's text or call that follows it.
    """
    chat: list[Message] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*chat, {"role": "user", "content": given}]
    thought = ""
    for i, item in enumerate(given):
        if isinstance(item, dict) and item.get("type") == "reasoning":
            thought += _thought(item)
            continue
        _append(chat, item, f"input.{i}")
        if thought and chat[-1]["role"] == "assistant":
            chat[-1]["reasoning_content"] = chat[-1].get("reasoning_content", "") + thought
        thought = ""
    return chat


def _thought(item: Mapping[str, Any]) -> str:
    """The text of an item of reasoning, or its summary."""
    parts = item.get("content") or item.get("summary")
    texts = (part.get("text") for part in parts if isinstance(part, dict)) if isinstance(parts, list) else ()
    return "\n".join(text for text in texts if isinstance(text, str))


def _append(chat: list[Message], item: object, at: str) -> None:
    if not isinstance(item, dict):
        raise RequestError(f"{at}: must be an object", at)
    kind = item.get("type") or "message"
    if kind == "message":
        chat.append(_message(item, at))
    elif kind == "function_call":
        _append_call(chat, item, at)
    elif kind == "function_call_output":
        call_id = _text(item, "call_id", at)
        chat.append({"role": "tool", "tool_call_id": call_id, "content": _content(item.get("output"), f"{at}.output")})
    elif kind == "item_reference":
        raise RequestError(f"{at}: item_reference is not supported: nothing is stored; send the item itself", at)
    else:
        raise RequestError(f"{at}: items of type {shown(kind)} are not supported; only messages and function calls", at)


def _message(item: Mapping[str, Any], at: str) -> Message:
    role = item.get("role")
    if role not in _ROLES:
        raise RequestError(f"{at}.role: must be one of {', '.join(_ROLES)}, not {shown(role)}", f"{at}.role")
    return {"role": role, "content": _content(item.get("content"), f"{at}.content")}


def _append_call(chat: list[Message], item: Mapping[str, Any], at: str) -> None:
    """Append a call. Those that follow a text of the assistant, or each other, belong to one message of a chat."""
    function = {"name": _text(item, "name", at), "arguments": _text(item, "arguments", at)}
    call = {"id": _text(item, "call_id", at), "type": "function", "function": function}
    if not chat or chat[-1]["role"] != "assistant":
        chat.append({"role": "assistant", "content": None})
    chat[-1].setdefault("tool_calls", []).append(call)


def _content(value: object, at: str) -> str | list[dict[str, str]]:
    """A text or text parts, in the chat's form."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise RequestError(f"{at}: must be a string or a list of text parts", at)
    parts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        field = _TEXTS.get(kind) if isinstance(kind, str) else None
        text = part.get(field) if isinstance(part, dict) and field else None
        if not isinstance(text, str):
            raise RequestError(f"{at}: parts of type {shown(kind)} are not supported; only text is", at)
        parts.append({"type": "text", "text": text})
    return parts


def _text(item: Mapping[str, Any], field: str, at: str) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        raise RequestError(f"{at}.{field}: must be a string", f"{at}.{field}")
    return value


# -- the request ------------------------------------------------------------------------------------------------------

NOT_STORED = "nothing is stored here: send the conversation in `input`"
_REFUSED = {
    "previous_response_id": NOT_STORED,
    "conversation": NOT_STORED,
    "prompt": NOT_STORED,
    "background": f"{NOT_STORED}, and take the answer from this request",
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
_NAMES |= {"reasoning_effort": "reasoning.effort"}
_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (_LOGPROBS, "reasoning.encrypted_content")  # the latter gives none: reasoning is sent as it is


class TextOptions(Body):
    format: dict[str, Any] | None = Field(default=None, description="text, json_object or json_schema")
    verbosity: ShortText | None = Field(default=None, description="accepted; it changes nothing")


class ResponseStreamOptions(Body):
    include_obfuscation: bool = Field(default=False, description="accepted; events are never padded")


class ResponsesRequest(Hints):
    """POST /v1/responses. Further fields are those of chat completions: `seed`, `top_k`, `priority` and others."""

    model_config = ConfigDict(extra="allow")
    also_known = ChatCompletionRequest.known | _REFUSED.keys() | _CHAT_ONLY.keys()

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
    reasoning: SmallObject | None = Field(default=None, description="effort: how long a reasoning model thinks")
    max_tool_calls: int | None = Field(default=None, description="accepted; it counts tools of the server alone")
    user: ShortText | None = None

    def chat_body(self) -> dict[str, Any]:
        """The body of the chat request. Raises RequestError for what a chat cannot say."""
        extra = dict(self.model_extra or {})
        for name in extra:
            if name in _REFUSED and extra[name] is not False:
                raise UnsupportedParameter(f"{name} is not supported: {_REFUSED[name]}", name)
            if name in _CHAT_ONLY:
                raise RequestError(f"{name} is a field of chat completions; use {_CHAT_ONLY[name]}", name)
        body = {name: value for name, value in extra.items() if name not in _REFUSED}
        body |= {"model": self.model, "messages": messages(self.instructions, self.input)}
        body |= {"temperature": self.temperature, "top_p": self.top_p, "stream": self.stream}
        given = {
            "max_completion_tokens": self.max_output_tokens,
            "response_format": _response_format(self.text.format),
            "user": self.user,
            "reasoning_effort": self.effort,
            "include_reasoning": self.include_reasoning,
        }
        body |= {name: value for name, value in given.items() if value is not None}
        return body | self._tools() | self._logprobs()

    @property
    def effort(self) -> Any:
        """The effort is that of `reasoning`, or else of the field by which chats say it."""
        return (self.reasoning or {}).get("effort") or self.reasoning_effort

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


# -- the answer -------------------------------------------------------------------------------------------------------

Event = dict[str, Any]


class ResponseBuilder:
    """A collector of one answer. Each method returns the events of its change; `response` is the answer as it is now.

    A streamed answer is `opening`, then `reasoning`, `text`, `call` and `arguments` in the order of generation, then
    `finish` or `fail`. One that is not streamed takes the same calls.
    """

    def __init__(self, request: ResponsesRequest) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._request = request
        self._created_at = int(time.time())
        self._output: list[dict[str, Any]] = []
        self._is_open = False  # the last item of the output
        self._pieces: list[str] = []  # of its text or arguments
        self._logprobs: list[dict[str, Any]] = []
        self._num_events = 0

    def opening(self) -> list[Event]:
        return [
            self._event("response.created", response=self.response("in_progress")),
            self._event("response.in_progress", response=self.response("in_progress")),
        ]

    def text(self, delta: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """Text of the assistant's message, which begins with the first one."""
        events = self._opened("message")
        self._pieces.append(delta)
        self._logprobs += logprobs
        if delta or logprobs:
            events.append(self._part_event("response.output_text.delta", delta=delta, logprobs=list(logprobs)))
        return events

    def reasoning(self, delta: str) -> list[Event]:
        """A part of what the model thinks before its answer."""
        events = self._opened("reasoning")
        self._pieces.append(delta)
        return [*events, self._part_event("response.reasoning_text.delta", delta=delta)]

    def call(self, call_id: str, name: str) -> list[Event]:
        """The beginning of a function call, whose `arguments` follow."""
        events = list(self._close("completed"))
        item = {"id": _new_id("fc"), "type": "function_call", "status": "in_progress", "arguments": ""}
        return [*events, self._open(item | {"call_id": call_id, "name": name})]

    def arguments(self, delta: str) -> list[Event]:
        self._pieces.append(delta)
        return [self._item_event("response.function_call_arguments.delta", delta=delta)] if delta else []

    def finish(self, finish_reason: str | None, usage: Usage) -> list[Event]:
        status = "incomplete" if finish_reason == "length" else "completed"
        events = [] if self._output else self._opened("message")
        events += self._close(status)
        return [*events, self._event(f"response.{status}", response=self.response(status, usage))]

    def fail(self, code: str, message: str) -> list[Event]:
        """The end of an answer that failed, whose open item stays incomplete."""
        if self._is_open:
            self._item.update(self._content("incomplete"))
            self._is_open = False
        response = self.response("failed") | {"error": {"code": code, "message": message}}
        return [self._event("response.failed", response=response)]

    def response(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        request = self._request
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": [dict(item) for item in self._output],
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": request.effort, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": request.temperature,
            "text": {"format": request.text.format or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools,
            "top_logprobs": request.top_logprobs or 0,
            "top_p": request.top_p,
            "truncation": request.truncation,
            "usage": None if usage is None else _usage(usage),
            "user": request.user,
        }

    @property
    def _item(self) -> dict[str, Any]:
        return self._output[-1]

    def _open(self, item: dict[str, Any]) -> Event:
        self._output.append(item)
        self._is_open, self._pieces, self._logprobs = True, [], []
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=dict(item))

    def _opened(self, kind: Literal["message", "reasoning"]) -> list[Event]:
        """The events before a text of this kind: none where its item is open."""
        if self._is_open and self._item["type"] == kind:
            return []
        item: dict[str, Any] = {"id": _new_id("rs"), "type": "reasoning", "summary": []}
        if kind == "message":
            item = {"id": _new_id("msg"), "type": "message", "status": "in_progress", "role": "assistant"}
        events = [*self._close("completed"), self._open(item | {"content": []})]
        part = _part("", []) if kind == "message" else _thought_part("")
        return [*events, self._part_event("response.content_part.added", part=part)]

    def _close(self, status: str) -> Iterator[Event]:
        if not self._is_open:
            return
        item = self._item
        item.update(self._content(status))
        if item["type"] == "message":
            part = item["content"][0]
            yield self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
            yield self._part_event("response.content_part.done", part=part)
        elif item["type"] == "reasoning":
            part = item["content"][0]
            yield self._part_event("response.reasoning_text.done", text=part["text"])
            yield self._part_event("response.content_part.done", part=part)
        else:
            yield self._item_event(
                "response.function_call_arguments.done", name=item["name"], arguments=item["arguments"]
            )
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=dict(item))
        self._is_open = False

    def _content(self, status: str) -> dict[str, Any]:
        text = "".join(self._pieces)
        if self._item["type"] == "message":
            return {"status": status, "content": [_part(text, self._logprobs)]}
        if self._item["type"] == "reasoning":
            return {"content": [_thought_part(text)]}
        return {"status": status, "arguments": text}

    def _part_event(self, kind: str, **fields: Any) -> Event:
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, item_id=self._item["id"], output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _thought_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
