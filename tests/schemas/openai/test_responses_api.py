"""The Responses API as chat completions: what a request becomes, and the events of its answer."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from loray.errors import RequestError
from loray.schemas.openai import Usage, parse
from loray.schemas.openai.responses_api import ResponseBuilder, ResponsesRequest, chat_request, renamed

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}


def request(**fields: Any) -> ResponsesRequest:
    return parse(ResponsesRequest, {"model": "m", "input": "hi"} | fields)


def chat(**fields: Any) -> dict[str, Any]:
    return request(**fields).chat_body()


def test_a_text_and_instructions() -> None:
    body = chat(instructions="be brief", max_output_tokens=5, temperature=0.5, user="me", seed=3, top_k=7)
    kept = {"model": "m", "temperature": 0.5, "top_p": 1.0, "stream": False, "user": "me", "seed": 3, "top_k": 7}
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert body == kept | {"messages": messages, "max_completion_tokens": 5}


def test_items_are_messages() -> None:
    said = {"type": "output_text", "text": "b", "annotations": [], "logprobs": []}
    items = [
        {"role": "developer", "content": "rules"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}], "status": "completed"},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "content": [said]},
        {"type": "function_call", "id": "fc_1", "call_id": "1", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
        {"type": "reasoning", "id": "s", "summary": [{"type": "summary_text", "text": "so"}]},
        {"type": "function_call", "call_id": "3", "name": "f", "arguments": "{}"},
        {"type": "reasoning", "id": "t", "summary": [], "content": [{"type": "reasoning_text", "text": "cut off"}]},
        {"role": "user", "content": "go on"},
        {"type": "reasoning", "id": "u", "summary": 5, "content": None},
    ]

    def text(value: str) -> dict[str, str]:
        return {"type": "text", "text": value}

    def call(call_id: str, name: str) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}

    assert chat(input=items)["messages"] == [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": [text("a")]},
        {
            "role": "assistant",
            "content": [text("b")],
            "reasoning_content": "hm",
            "tool_calls": [call("1", "f"), call("2", "g")],
        },
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "tool", "tool_call_id": "2", "content": [text("y")]},
        {"role": "assistant", "content": None, "reasoning_content": "so", "tool_calls": [call("3", "f")]},
        {"role": "user", "content": "go on"},
    ]


def test_tools_and_formats() -> None:
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    body = chat(tools=[TOOL], tool_choice={"type": "function", "name": "f"}, parallel_tool_calls=False)
    assert body["tools"] == [{"type": "function", "function": function}]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert body["parallel_tool_calls"] is False
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
    body = chat(tools=[TOOL, TOOL | {"name": "g"}], tool_choice=allowed)
    assert [t["function"]["name"] for t in body["tools"]] == ["g"]
    assert body["tool_choice"] == "required"
    assert "tool_choice" not in chat(tool_choice="auto")
    schema = {"name": "n", "schema": {"type": "object"}, "strict": True}
    asked = chat(text={"format": {"type": "json_schema"} | schema})["response_format"]
    assert asked == {"type": "json_schema", "json_schema": schema}
    logprobs = chat(include=["message.output_text.logprobs"], top_logprobs=2)
    assert (logprobs["logprobs"], logprobs["top_logprobs"]) == (True, 2)


def test_hints_change_nothing() -> None:
    hints = {"store": True, "metadata": {"a": "b"}, "reasoning": {"summary": "auto"}, "background": False}
    hints |= {"truncation": "disabled", "previous_response_id": None, "include": ["reasoning.encrypted_content"]}
    assert chat(**hints, service_tier="auto", prompt_cache_key="k", text={"verbosity": "low"}) == chat()


def test_the_effort_is_the_chats() -> None:
    assert chat(reasoning={"effort": "low"}, include_reasoning=False) == chat() | {
        "reasoning_effort": "low",
        "include_reasoning": False,
    }
    assert chat(reasoning_effort="high", thinking_token_budget=3) == chat() | {
        "reasoning_effort": "high",
        "thinking_token_budget": 3,
    }
    with pytest.raises(RequestError) as e:
        chat_request(request(reasoning={"effort": 5}))
    assert renamed(e.value).param == "reasoning.effort"
    assert ResponseBuilder(request(reasoning={"effort": "low"})).response("completed")["reasoning"]["effort"] == "low"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"input": [{"type": "item_reference", "id": "i"}]}, "input.0"),
        ({"input": ["a"]}, "input.0"),
        ({"input": [{"type": "computer_call"}]}, "input.0"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": []}]}, "input.0.content"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0.call_id"),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as e:
        chat(**fields)
    assert e.value.param == param
    assert param in str(e.value)


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [e["type"].removeprefix("response.") for e in events]


def test_thoughts_are_an_item_of_their_own() -> None:
    answer = ResponseBuilder(request())
    events = [*answer.reasoning("so"), *answer.reasoning(" on"), *answer.text("a")]
    events += answer.finish("stop", Usage.of(3, 5, 0, 2))
    thought = ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta"]
    thought += ["reasoning_text.done", "content_part.done", "output_item.done"]
    assert kinds(events)[:8] == [*thought, "output_item.added"]
    assert {e["output_index"] for e in events[:7]} == {0}
    assert (events[4]["text"], events[5]["part"]) == ("so on", {"type": "reasoning_text", "text": "so on"})
    for event in events:
        EVENT.validate_python(event)
    response = events[-1]["response"]
    first, second = response["output"]
    content = [{"type": "reasoning_text", "text": "so on"}]
    assert first == {"id": first["id"], "type": "reasoning", "summary": [], "content": content}
    assert (first["id"][:3], second["type"]) == ("rs_", "message")
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    cut_off = ResponseBuilder(request())
    cut_off.reasoning("so")
    (item,) = cut_off.finish("length", Usage.of(3, 2, 0, 2))[-1]["response"]["output"]
    assert item["content"] == [{"type": "reasoning_text", "text": "so"}]


def test_a_text_streams_in_openais_order() -> None:
    answer = ResponseBuilder(request(metadata={"a": "b"}))
    logprob = {"token": "b", "logprob": -1.0, "bytes": [98], "top_logprobs": []}
    events = [*answer.opening(), *answer.text("a"), *answer.text("b", [logprob])]
    events += answer.finish("stop", Usage.of(3, 2, 1))
    begun, done = ["created", "in_progress", "output_item.added", "content_part.added"], ["output_text.done"]
    done += ["content_part.done", "output_item.done", "completed"]
    assert kinds(events) == [*begun, "output_text.delta", "output_text.delta", *done]
    assert [e["sequence_number"] for e in events] == list(range(10))
    assert events[0]["response"]["output"] == []
    assert events[2]["item"]["content"] == []
    for event in events:
        EVENT.validate_python(event, strict=True)
    response = OpenAIResponse.model_validate(events[-1]["response"], strict=True)
    assert response.output_text == "ab"
    assert (response.status, response.store, response.metadata) == ("completed", False, {"a": "b"})
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.input_tokens_details.cached_tokens) == (3, 1)
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == [logprob]


def test_calls_follow_a_text_as_items_of_their_own() -> None:
    answer = ResponseBuilder(request(tools=[TOOL]))
    events = [*answer.opening(), *answer.text("so: "), *answer.call("1", "f")]
    events += [*answer.arguments('{"a"'), *answer.arguments(":1}"), *answer.call("2", "f"), *answer.arguments("{}")]
    events += answer.finish("tool_calls", Usage.of(3, 2))
    piece, end = "function_call_arguments.delta", ["function_call_arguments.done", "output_item.done"]
    calls = ["output_item.added", piece, piece, *end, "output_item.added", piece, *end]
    assert kinds(events)[5:] == ["output_text.done", "content_part.done", "output_item.done", *calls, "completed"]
    for event in events:
        EVENT.validate_python(event, strict=True)
    output = events[-1]["response"]["output"]
    assert [i["type"] for i in output] == ["message", "function_call", "function_call"]
    assert [(i["call_id"], i["arguments"]) for i in output[1:]] == [("1", '{"a":1}'), ("2", "{}")]
    indices = [e["output_index"] for e in events if "output_index" in e]
    assert indices == sorted(indices)


def test_an_answer_that_reaches_its_limit_is_incomplete() -> None:
    answer = ResponseBuilder(request())
    events = [*answer.opening(), *answer.text("a"), *answer.finish("length", Usage.of(3, 2))]
    assert kinds(events)[-1] == "incomplete"
    response = events[-1]["response"]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["status"] == "incomplete"
    EVENT.validate_python(events[-1], strict=True)


def test_an_empty_answer_is_an_empty_message() -> None:
    answer = ResponseBuilder(request())
    *_, last = answer.finish("stop", Usage.of(3, 0))
    assert last["response"]["output"][0]["content"][0]["text"] == ""


def test_a_failure_is_the_last_event() -> None:
    answer = ResponseBuilder(request())
    events = [*answer.opening(), *answer.text("a"), *answer.fail("server_error", "lost")]
    assert kinds(events)[-1] == "failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "lost"}
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "a"
    EVENT.validate_python(events[-1], strict=True)
