"""Tools in chat requests: every form that clients send, what is refused, and calls in answers."""

from __future__ import annotations

from typing import Any

import pytest

from loray.errors import RequestError
from loray.schemas.openai import ChatCompletionRequest, parse
from loray.schemas.openai.formats import assistant_message, chat_delta
from loray.schemas.openai.requests import for_template
from loray.spec import Delta, Tool, ToolCallDelta, ToolUse

PARAMETERS = {"type": "object", "properties": {"a": {"type": "number"}}}
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": PARAMETERS}}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "now"}}


def chat(*messages: dict[str, Any], **fields: Any) -> ChatCompletionRequest:
    given = list(messages) or [{"role": "user", "content": "hi"}]
    return parse(ChatCompletionRequest, {"model": "m", "messages": given} | fields)


def use(**fields: Any) -> ToolUse | None:
    return chat(**fields).tool_use


def test_what_a_request_asks_for() -> None:
    tools = (Tool("add", PARAMETERS, "adds"), Tool("now", {"type": "object", "properties": {}}))
    assert use(tools=[ADD, NOW]) == ToolUse(tools)
    assert use(tools=[ADD, NOW], tool_choice="required", parallel_tool_calls=False) == ToolUse(tools, "required", False)
    named = use(tools=[ADD, NOW], tool_choice=NAMED)
    assert named is not None
    assert (named.callable, named.forced, named.num_calls) == (tools[1:], True, 1)
    allowed = {"mode": "required", "tools": [NAMED]}
    of_two = use(tools=[ADD, NOW], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert of_two == ToolUse(tools[1:], "required")
    strict = use(tools=[{"type": "function", "function": NOW["function"] | {"strict": True, "parameters": None}}])
    assert strict is not None
    assert strict.tools[0].strict
    for nothing in ({}, {"tools": []}, {"tools": [ADD], "tool_choice": "none"}, {"tool_choice": "auto"}):
        assert use(**nothing) is None


@pytest.mark.parametrize(
    ("fields", "reason", "param"),
    [
        ({"tool_choice": "required"}, "no tools", "tool_choice"),
        ({"tools": [ADD], "tool_choice": NAMED}, "names 'now'; the tools are add", "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "any"}}, "must be none, auto, required", "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "must be", "tool_choice"),
        ({"tools": [ADD, ADD]}, "two tools are called 'add'", "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools of type 'web_search'", "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name: ", "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "x": 1}}]}, "unknown field", "tools.0.function.x"),
        ({"tools": [NOW] * 129}, "at most 128", "tools"),
        ({"functions": [{"name": "f"}]}, "use tools", "functions"),
        ({"function_call": {"name": "f"}}, "use tools", "function_call"),
        ({"chat_template": "{{ 1 }}"}, "its own", "chat_template"),
        ({"documents": [{"text": "x"}]}, "messages", "documents"),
        ({"chat_template_kwargs": {"tools": []}}, "tools", "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "either", "continue_final_message"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], reason: str, param: str) -> None:
    with pytest.raises(RequestError, match=reason) as refused:
        use(**fields)
    assert refused.value.param == param


CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def test_messages_of_an_agents_loop() -> None:
    request = chat(
        {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0}], "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "assistant", "content": "2", "tool_calls": [], "reasoning_content": "hm"},
    )
    function = {"name": "add", "arguments": {"a": 1}}
    assert for_template(request.messages) == [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "call_1", "name": "add"},
        {"role": "assistant", "content": "2"},
    ]


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    broken = CALL | {"function": {"name": "add", "arguments": '{"a": oh'}}
    request = chat({"role": "assistant", "tool_calls": [broken]})
    assert for_template(request.messages)[0]["tool_calls"][0]["function"]["arguments"] == '{"a": oh'


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "tool", "content": "2"}, "tool_call_id"),
        ({"role": "user", "content": "2", "tool_calls": [CALL]}, "only an assistant's message"),
        ({"role": "assistant"}, "content is required"),
        ({"role": "function", "name": "f", "content": "2"}, "use tools"),
        ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, "use tools"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "function": {"arguments": "{}"}}]}, "is required"),
    ],
)
def test_messages_that_are_refused(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        chat(message)


DELTAS = [
    ToolCallDelta(0, "call_1", "add", ""),
    ToolCallDelta(0, None, None, '{"a"'),
    ToolCallDelta(0, None, None, ": 1}"),
    ToolCallDelta(1, "call_2", "now", ""),
    ToolCallDelta(1, None, None, "{}"),
]


def delta(text: str = "", calls: tuple[ToolCallDelta, ...] = (), end: Any = None) -> Delta:
    return Delta(text, (), None, end, 0, 0, tool_calls=calls)


def test_calls_in_messages_and_chunks() -> None:
    both = '"tool_calls":[{"id":"call_1","type":"function","function":{"name":"add","arguments":"{\\"a\\": 1}"}},'
    both += '{"id":"call_2","type":"function","function":{"name":"now","arguments":"{}"}}]}'
    assert assistant_message("", DELTAS).to_json() == f'{{"role":"assistant","content":null,"refusal":null,{both}'
    assert assistant_message("So", DELTAS).content == "So"
    assert assistant_message("", []).to_json() == '{"role":"assistant","content":"","refusal":null}'
    begun = '{"tool_calls":[{"index":0,"id":"call_1","type":"function","function":{"name":"add","arguments":""}}]}'
    assert chat_delta(delta(calls=(DELTAS[0],))).to_json() == begun
    more = '{"tool_calls":[{"index":0,"function":{"arguments":"{\\"a\\": 1}"}}]}'
    assert chat_delta(delta(calls=tuple(DELTAS[1:3]))).to_json() == more
    assert chat_delta(delta("a", (DELTAS[1],))).to_json().startswith('{"content":"a","tool_calls":')
    assert chat_delta(delta(end="tool_calls")).to_json() == "{}"
    assert chat_delta(delta()).to_json() == '{"content":""}'
