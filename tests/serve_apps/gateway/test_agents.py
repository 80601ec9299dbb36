"""Agents and their libraries, unmodified, against the gateway on a real engine with a tiny base, over HTTP.

The tiny model writes at random, so tool_choice says when it calls and when it stops; the forms must hold.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
import uvicorn
from pydantic import BaseModel as Model
from pydantic import Field

from loray.bases.registry import BaseModel
from loray.engine.build import build_engine
from loray.engine.stream import EngineStream
from loray.spec import ServeSpec
from serve_apps.standalone.engines import LocalEngines
from tests.cluster import free_port
from tests.serve_apps.gateway.scripted import catalog_url, gateway_app

ASK: Any = [{"role": "user", "content": "What is 1 + 2?"}]
Digit = Annotated[int, Field(ge=0, le=9)]


class Add(Model):
    """Adds two digits."""

    a: Digit
    b: Digit


class Paint(Model):
    """Paints."""

    color: Literal["red", "blue"]


ADD, PAINT = openai.pydantic_function_tool(Add, name="add"), openai.pydantic_function_tool(Paint, name="paint")


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base(max_position_embeddings=4096)


@pytest.fixture(scope="module")
def url(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server in this process: LangChain and LiteLLM bring transports of their own."""
    spec = ServeSpec(base=base.name, dtype="float32", pool_bytes=32 << 20, max_num_seqs=8)

    def no_adapters(ref: Any) -> Any:
        raise AssertionError(ref)

    engine = EngineStream(build_engine(spec, base, no_adapters))
    engine.start()
    app = gateway_app(base, catalog_url(tmp_path_factory.mktemp("catalog")), LocalEngines(engine))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join()
    engine.stop()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


# -- OpenAI's client --------------------------------------------------------------------------------------------------


def test_answers_are_parsed(client: openai.OpenAI, base: BaseModel) -> None:
    given: Any = {"model": base.name, "messages": ASK, "response_format": Add, "max_tokens": 1500}
    for seed in range(3):
        whole = client.chat.completions.parse(**given, seed=seed).choices[0].message.parsed
        assert isinstance(whole, Add)
        with client.chat.completions.stream(**given, seed=seed) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == whole


def test_calls_are_parsed_whole_and_streamed(client: openai.OpenAI, base: BaseModel) -> None:
    given: Any = {"model": base.name, "messages": ASK, "tools": [ADD, PAINT], "max_tokens": 400}
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


def test_responses_are_parsed_with_formats_and_calls(client: openai.OpenAI, base: BaseModel) -> None:
    given: Any = {"model": base.name, "input": ASK, "max_output_tokens": 400, "extra_body": {"seed": 1}}
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


def test_an_agents_loop_with_two_tools_ends(client: openai.OpenAI, base: BaseModel) -> None:
    tools: dict[str, Callable[[dict[str, Any]], object]] = {"add": lambda a: a["a"] + a["b"], "paint": lambda a: "done"}
    choices: Iterator[Any] = iter([{"type": "function", "function": {"name": "add"}}, "required", "none"])
    messages, called = list(ASK), list[str]()
    while True:
        answer = client.chat.completions.create(
            model=base.name,
            messages=messages,
            tools=[ADD, PAINT],
            tool_choice=next(choices),
            parallel_tool_calls=False,
            max_tokens=100,
            seed=1,
        ).choices[0]
        messages.append(answer.message)
        if not answer.message.tool_calls:
            break
        assert answer.finish_reason == "tool_calls"
        for call in answer.message.tool_calls:
            assert call.type == "function"
            called.append(call.function.name)
            result = json.dumps(tools[call.function.name](json.loads(call.function.arguments)))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert called[0] == "add"
    assert len(called) == 2
    assert isinstance(answer.message.content, str)
    assert next(choices, None) is None


def test_a_stream_has_openais_deltas(client: openai.OpenAI, base: BaseModel) -> None:
    choice: Any = {"type": "function", "function": {"name": "paint"}}
    chunks = list(
        client.chat.completions.create(
            model=base.name, messages=ASK, tools=[PAINT], tool_choice=choice, stream=True, temperature=0
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


def test_the_responses_api_calls_tools(client: openai.OpenAI, base: BaseModel) -> None:
    tool: Any = {"type": "function", "name": "paint", "parameters": PAINT["function"]["parameters"], "strict": True}
    given: Any = {"model": base.name, "input": "Paint.", "tools": [tool], "tool_choice": "required", "temperature": 0}
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


def test_what_cannot_be_enforced_is_refused(client: openai.OpenAI, base: BaseModel) -> None:
    odd: Any = {"type": "function", "function": {"name": "odd", "strict": True, "parameters": {"not": {}}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=base.name, messages=ASK, tools=[odd])
    assert refused.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="older form"):
        client.chat.completions.create(model=base.name, messages=ASK, functions=[{"name": "f"}])


# -- LangChain --------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(url: str, base: BaseModel) -> Iterator[Any]:
    from langchain_openai import ChatOpenAI

    with httpx.Client() as http:  # the library's own is kept for ever
        yield ChatOpenAI(
            model=base.name, base_url=url, api_key="none", http_client=http, max_retries=0, max_tokens=1500, seed=3
        )


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # LangChain on events of OpenAI's client
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_gives_structured_output(chat: Any, method: str) -> None:
    if method == "json_mode":
        answer = chat.bind(response_format={"type": "json_object"}, temperature=0, max_tokens=40).invoke("JSON?")
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


# -- LiteLLM ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def complete(client: openai.OpenAI, base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is fetched
    import litellm

    def complete(**fields: Any) -> Any:
        given = {"messages": ASK, "max_tokens": 1500, "seed": 2} | fields
        return litellm.completion(model=f"openai/{base.name}", client=client, num_retries=0, **given)

    return complete


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
