"""LangChain and LiteLLM, unmodified, on both servers: structured output and tools."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Literal

import httpx
import openai
import pytest

from tests.fixtures.cluster import Served
from tests.serve_apps.agents import ADD, ASK, PAINT, Add, Digit, Paint


@pytest.fixture
def chat(server: Served) -> Iterator[Any]:
    from langchain_openai import ChatOpenAI

    with httpx.Client() as http:  # the library's own is kept for ever
        yield ChatOpenAI(
            model="tiny",
            base_url=f"{server.url}/v1",
            api_key="none",
            http_client=http,
            max_retries=0,
            max_tokens=1500,
            seed=3,
        )


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # LangChain on events of OpenAI's client
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_gives_structured_output(chat: Any, method: str) -> None:
    if method == "json_mode":
        braces = {str(ord(brace) - 33): 100 for brace in "{}"}  # else a random model's object may be of any length
        answer = chat.bind(response_format={"type": "json_object"}, logit_bias=braces, max_tokens=40).invoke("JSON?")
        assert answer.content.startswith("{")
        return
    structured = chat.with_structured_output(Add, method=method)
    assert isinstance(structured.invoke("What is 1 + 2?"), Add)
    assert list(structured.stream("What is 1 + 2?"))[-1] == structured.invoke("What is 1 + 2?")


def test_langchain_loops_over_tools(chat: Any) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool

    @tool
    def add(a: Digit, b: Digit) -> int:
        """Adds two digits."""
        return a + b

    @tool
    def paint(color: Literal["red", "blue"]) -> str:
        """Paints."""
        return f"{color} it is"

    tools = {t.name: t for t in (add, paint)}
    messages: list[Any] = [HumanMessage("What is 1 + 2?")]
    for choice in ("any", "add"):
        answer = chat.bind_tools([add, paint], tool_choice=choice, parallel_tool_calls=False).invoke(messages)
        (call,) = answer.tool_calls
        assert answer.invalid_tool_calls == []
        messages += [answer, tools[call["name"]].invoke(call)]
    joined = None
    for chunk in chat.bind_tools([add, paint], tool_choice="paint").stream(messages):
        joined = chunk if joined is None else joined + chunk
    assert joined is not None
    assert [c["name"] for c in joined.tool_calls] == ["paint"]
    last = chat.bind_tools([add, paint], tool_choice="none").bind(max_tokens=8).invoke(messages)
    assert isinstance(last.content, str)
    assert last.tool_calls == []


@pytest.fixture
def complete(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is fetched
    import litellm

    def complete(**fields: Any) -> Any:
        given = {"messages": ASK, "max_tokens": 1500, "seed": 2} | fields
        return litellm.completion(model="openai/tiny", client=client, num_retries=0, **given)

    with asyncio.Runner() as runner:
        asyncio.set_event_loop(runner.get_loop())  # the library makes one where there is none, and leaves it open
        yield complete
        asyncio.set_event_loop(None)


def test_litellm_calls_tools_and_parses_answers(complete: Callable[..., Any]) -> None:
    import litellm

    whole = complete(tools=[ADD, PAINT], tool_choice="required", parallel_tool_calls=False)
    message = whole.choices[0].message
    (call,) = message.tool_calls
    assert whole.choices[0].finish_reason == "tool_calls"
    {"add": Add, "paint": Paint}[call.function.name].model_validate_json(call.function.arguments)
    chunks = list(complete(tools=[ADD, PAINT], tool_choice="required", parallel_tool_calls=False, stream=True))
    joined = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert [c.function.arguments for c in joined] == [call.function.arguments]
    result = {"role": "tool", "tool_call_id": call.id, "content": "3"}
    last = complete(messages=[*ASK, message.model_dump(), result], tools=[ADD, PAINT], tool_choice="none", max_tokens=8)
    assert last.choices[0].message.tool_calls is None
    Add.model_validate_json(complete(response_format=Add).choices[0].message.content)
