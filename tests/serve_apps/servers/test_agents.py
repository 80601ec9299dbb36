"""Agents with OpenAI's client, unmodified, on both servers. The tiny model writes at random; the forms must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from loray.bases.registry import BaseModel
from tests.fixtures.standalone import standalone
from tests.serve_apps.agents import ADD, ASK, NAMED_ADD, PAINT, Add, Paint, loop
from tests.serve_apps.asking import status


def test_answers_are_parsed(client: openai.OpenAI) -> None:
    given: Any = {"model": "tiny", "messages": ASK, "response_format": Add, "max_tokens": 1500}
    for seed in range(3):
        whole = client.chat.completions.parse(**given, seed=seed).choices[0].message.parsed
        assert isinstance(whole, Add)
        with client.chat.completions.stream(**given, seed=seed) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == whole


def test_calls_are_parsed_whole_and_streamed(client: openai.OpenAI) -> None:
    given: Any = {"model": "tiny", "messages": ASK, "tools": [ADD, PAINT], "max_tokens": 400}
    for seed in range(3):
        options = given | {"tool_choice": "required", "parallel_tool_calls": seed > 0, "seed": seed}
        choice = client.chat.completions.parse(**options).choices[0]
        calls = choice.message.tool_calls
        assert calls
        assert choice.message.content is None
        assert all(isinstance(call.function.parsed_arguments, Add | Paint) for call in calls) or (
            choice.finish_reason == "length"
        )
        assert choice.finish_reason in ("tool_calls", "length")
        with client.chat.completions.stream(**options) as stream:
            streamed = stream.get_final_completion().choices[0].message.tool_calls
        assert streamed is not None
        assert [(c.function.name, c.function.arguments) for c in streamed] == [
            (c.function.name, c.function.arguments) for c in calls
        ]


def test_responses_are_parsed_with_formats_and_calls(client: openai.OpenAI) -> None:
    given: Any = {"model": "tiny", "input": ASK, "max_output_tokens": 400, "extra_body": {"seed": 1}}
    assert isinstance(client.responses.parse(**given, text_format=Add).output_parsed, Add)
    tools = [{"type": "function", **tool["function"]} for tool in (ADD, PAINT)]
    given |= {"tools": tools, "tool_choice": {"type": "function", "name": "add"}}
    (call,) = client.responses.create(**given).output
    assert call.type == "function_call"
    assert Add.model_validate_json(call.arguments)
    with client.responses.stream(**given) as stream:
        kinds = [event.type.removeprefix("response.") for event in stream]
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert (streamed.name, streamed.arguments) == ("add", call.arguments)
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    given |= {"input": [*ASK, call.to_dict(), output], "tool_choice": "none"}
    assert client.responses.create(**given).output[0].type == "message"


def test_an_agents_loop_with_two_tools_ends(client: openai.OpenAI) -> None:
    called, _ = loop(client, "tiny", [NAMED_ADD, "required", "none"], max_tokens=100, seed=1)
    assert called[0] == "add"
    assert len(called) == 2


def test_a_stream_has_openais_deltas(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "paint"}}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=ASK, tools=[PAINT], tool_choice=choice, stream=True, temperature=0
        )
    )
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    first, *rest = deltas
    assert first.id is not None
    assert first.id.startswith("call_")
    assert first.function is not None
    assert (first.index, first.type, first.function.name) == (0, "function", "paint")
    assert all(d.id is None and d.function is not None and d.function.name is None for d in rest)
    arguments = "".join(d.function.arguments or "" for d in deltas if d.function is not None)
    assert json.loads(arguments)["color"] in ("red", "blue")
    assert rest  # as they are written; how many pieces is a matter of the client's speed
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_responses_api_calls_tools(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "paint", "parameters": PAINT["function"]["parameters"], "strict": True}
    given: Any = {"model": "tiny", "input": "Paint.", "tools": [tool], "tool_choice": "required", "temperature": 0}
    given |= {"parallel_tool_calls": False}
    (call,) = client.responses.create(**given).output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["color"] in ("red", "blue")
    with client.responses.stream(**given) as stream:
        arguments = "".join(e.delta for e in stream if e.type == "response.function_call_arguments.delta")
    assert arguments == call.arguments
    back: Any = [
        {"role": "user", "content": "Paint."},
        call,
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
    ]
    last = client.responses.create(**given | {"input": back, "tool_choice": "none", "max_output_tokens": 8})
    assert last.output[0].type == "message"


def test_what_cannot_be_enforced_is_refused(client: openai.OpenAI) -> None:
    odd: Any = {"type": "function", "function": {"name": "odd", "strict": True, "parameters": {"not": {}}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=ASK, tools=[odd])
    assert refused.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="older form"):
        client.chat.completions.create(model="tiny", messages=ASK, functions=[{"name": "f"}])


@pytest.mark.slow
def test_a_real_model_keeps_the_forms(smollm2: BaseModel, tmp_path: Path) -> None:
    with (
        standalone(
            tmp_path, "--tool-parser", "llama3_json", base=smollm2, dtype="bfloat16", pool_bytes=64 << 20
        ) as server,
        openai.OpenAI(base_url=f"{server.served.url}/v1", api_key="none", max_retries=0, timeout=90) as client,
    ):
        assert status(server.served)["bases"][0]["spec"]["tool_parser"] == "llama3_json"
        model = smollm2.name
        called, _ = loop(client, model, [NAMED_ADD, "required", "none"], max_tokens=100, temperature=0)
        assert called[0] == "add"
        assert len(called) == 2
        fields: Any = {"model": model, "messages": ASK, "max_tokens": 100, "temperature": 0}
        assert isinstance(client.chat.completions.parse(**fields, response_format=Add).choices[0].message.parsed, Add)
        free = client.chat.completions.create(**fields, tools=[ADD, PAINT]).choices[0]
        assert free.finish_reason in ("stop", "tool_calls", "length")
        assert free.message.content or free.message.tool_calls
