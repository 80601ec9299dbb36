"""Anthropic's messages as chat completions: what a request becomes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from loray.errors import RequestError
from loray.schemas.anthropic import CountTokensRequest, MessagesRequest, chat_request
from loray.schemas.openai import parse

TOOL: dict[str, Any] = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}
HI = [{"role": "user", "content": "hi"}]


def request(**fields: Any) -> MessagesRequest:
    return parse(MessagesRequest, {"model": "m", "max_tokens": 100, "messages": HI} | fields)


def chat(**fields: Any) -> dict[str, Any]:
    return request(**fields).chat_body()


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def test_a_message_and_its_parameters() -> None:
    body = chat(
        system="be brief",
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        stop_sequences=["\n"],
        metadata={"user_id": "me"},
        stream=True,
        seed=3,
        cache_salt="s",
    )
    assert body == {
        "model": "m",
        "messages": [{"role": "system", "content": [text("be brief")]}, {"role": "user", "content": [text("hi")]}],
        "max_completion_tokens": 100,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "stop": ["\n"],
        "user": "me",
        "stream": True,
        "seed": 3,
        "cache_salt": "s",
    }
    assert parse(CountTokensRequest, {"model": "m", "messages": HI}).chat_body().keys() == {"model", "messages"}


def test_blocks_are_messages() -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    given = [
        {"role": "user", "content": [text("a") | cached, text("b")]},
        {"role": "user", "content": "c"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                text("d"),
                {"type": "tool_use", "id": "1", "name": "f", "input": {"x": "ä"}, "caller": {"type": "direct"}},
                {"type": "tool_use", "id": "2", "name": "f", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": "r"},
                {"type": "tool_result", "tool_use_id": "2", "content": [text("no")], "is_error": True} | cached,
                text("e"),
            ],
        },
        {"role": "assistant", "content": [{"type": "tool_use", "id": "3", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "3"}]},
        {"role": "system", "content": "now"},
    ]

    def call(call_id: str, arguments: str) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}

    system = [text("x-anthropic-billing-header: cc_version=2; cch=1a2b3;"), text("one") | cached, text("two")]
    assert chat(system=system, messages=given)["messages"] == [
        {"role": "system", "content": [text("one"), text("two")]},
        {"role": "user", "content": [text("a"), text("b"), text("c")]},
        {
            "role": "assistant",
            "content": [text("d")],
            "reasoning_content": "hm",
            "tool_calls": [call("1", '{"x":"ä"}'), call("2", "{}")],
        },
        {"role": "tool", "tool_call_id": "1", "content": [text("r")]},
        {"role": "tool", "tool_call_id": "2", "content": [text("Error:"), text("no")]},
        {"role": "user", "content": [text("e")]},
        {"role": "assistant", "content": None, "tool_calls": [call("3", "{}")]},
        {"role": "tool", "tool_call_id": "3", "content": ""},
        {"role": "system", "content": [text("now")]},
    ]
    chat_request(request(system=system, messages=given))


def test_the_last_turn_of_the_assistant_is_continued() -> None:
    begun = [*HI, {"role": "assistant", "content": "The answer is ("}]
    assert chat_request(request(messages=begun)).continue_final_message
    assert not chat_request(request(messages=[*begun, *HI])).continue_final_message


def test_tools() -> None:
    function = {"name": "f", "description": "d", "parameters": TOOL["input_schema"], "strict": None}
    asked: dict[str, Any] = {"tools": [TOOL | {"type": "custom", "cache_control": None, "input_examples": []}]}
    assert chat(**asked)["tools"] == [{"type": "function", "function": function}]
    for choice, is_in_chat in {
        "auto": "auto",
        "any": "required",
        "none": "none",
        "tool": {"type": "function", "function": {"name": "f"}},
    }.items():
        given = {"type": choice, "disable_parallel_tool_use": True} | ({"name": "f"} if choice == "tool" else {})
        body = chat(**asked, tool_choice=given)
        assert (body["tool_choice"], body["parallel_tool_calls"]) == (is_in_chat, False)
        chat_request(request(**asked, tool_choice=given))
    assert request(**asked, tool_choice={"type": "any"}).shows_arguments_early("f")
    assert not request(**asked, tool_choice={"type": "auto"}).shows_arguments_early("f")
    assert request(tools=[TOOL | {"eager_input_streaming": True}]).shows_arguments_early("f")
    assert request(tools=[TOOL | {"strict": True}]).shows_arguments_early("f")


def test_formats_and_thoughts() -> None:
    schema = {"type": "object", "properties": {}}
    body = chat(output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "max"})
    asked = {"type": "json_schema", "json_schema": {"name": "output", "schema": schema, "strict": True}}
    assert (body["response_format"], body["reasoning_effort"]) == (asked, "high")
    assert chat(output_config={"effort": "low"})["reasoning_effort"] == "low"
    enabled = {"type": "enabled", "budget_tokens": 1024}
    thinking = chat(thinking=enabled, max_tokens=2000)
    assert (thinking["chat_template_kwargs"], thinking["thinking_token_budget"]) == ({"enable_thinking": True}, 1024)
    assert chat(thinking={"type": "disabled"})["chat_template_kwargs"] == {"enable_thinking": False}
    for kind in ("adaptive", "between_tools"):
        assert chat(thinking={"type": kind, "display": "omitted"}) == chat()
    own = {"enable_thinking": False, "colour": "red"}
    assert chat(thinking=enabled, max_tokens=2000, chat_template_kwargs=own)["chat_template_kwargs"] == own


def test_the_limit_is_an_upper_bound() -> None:
    asked = chat_request(request(max_tokens=1 << 20))
    assert (asked.requested_max_tokens, asked.default_max_tokens) == (None, 1 << 20)


def test_hints_change_nothing() -> None:
    hints = {"service_tier": "auto", "speed": "fast", "inference_geo": "us", "diagnostics": {}, "mcp_servers": []}
    hints |= {"context_management": {"edits": []}, "cache_control": {"type": "ephemeral"}, "container": None}
    assert chat(**hints) == chat()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": ["a"]}, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result"}]}]}, "messages.0.content.0"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f"}]}]},
            "messages.0.content.0.input",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{}]}]}]},
            "messages.0.content.0.content.0",
        ),
        ({"system": [{"type": "image"}]}, "system.0"),
        ({"tools": ["f"]}, "tools.0"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1000}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1024}, "thinking.budget_tokens"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
        ({"mcp_servers": [{"url": "u"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"output_format": {"type": "json_schema"}}, "output_format"),
        ({"n": 2}, "n"),
        ({"stop": "a"}, "stop"),
        ({"logprobs": True}, "logprobs"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"min_p": 2}, "min_p"),
        ({"thinking": {"type": "disabled"}, "chat_template_kwargs": "a"}, "chat_template_kwargs"),
        ({"thinking": {"type": "adaptive"}, "chat_template_kwargs": ["a"]}, "chat_template_kwargs"),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as e:
        chat_request(request(**fields))
    assert e.value.param == param
    assert param in str(e.value)


def test_a_call_without_a_result_cannot_be_continued() -> None:
    calls = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}
    with pytest.raises(RequestError, match="no tool_result"):
        chat(messages=[*HI, calls])
