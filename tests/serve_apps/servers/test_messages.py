"""Anthropic's client and LiteLLM's route to it, unmodified, on both servers: messages, streams, tools and formats."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from loray.catalog import AdapterVersion
from tests.fixtures.agents import ASK, Add, Paint
from tests.fixtures.cluster import Served

FORMS = {"add": Add, "paint": Paint}
TOOLS: Any = [
    {"name": name, "description": form.__doc__, "input_schema": form.model_json_schema(), "strict": True}
    for name, form in FORMS.items()
]
GIVEN: Any = {"model": "tiny", "max_tokens": 1500, "messages": ASK, "extra_body": {"seed": 1}}


@pytest.fixture(scope="module")
def api(server: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=90) as client:
        yield client


def test_a_stream_brings_what_a_message_has(api: anthropic.Anthropic, tone: list[AdapterVersion]) -> None:
    texts = set()
    for model in ("tiny", "tone@1"):
        given: Any = GIVEN | {"model": model, "max_tokens": 12, "extra_body": {"temperature": 0, "ignore_eos": True}}
        whole = api.messages.create(**given)
        with api.messages.stream(**given) as stream:
            streamed = stream.get_final_message()
        (said,), (again,) = whole.content, streamed.content
        assert said.type == again.type == "text"
        assert again.text == said.text
        assert (streamed.stop_reason, streamed.usage.output_tokens) == ("max_tokens", 12)
        counted = api.messages.count_tokens(model=model, messages=ASK).input_tokens
        assert counted == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
        texts.add(said.text)
    assert len(texts) == 2
    assert {"tiny", "tone"} <= {model.id for model in api.models.list(limit=1000)}


def test_a_loop_with_tools(api: anthropic.Anthropic) -> None:
    """A random model writes at random, so `tool_choice` says when it calls and when it stops."""
    messages: list[Any] = [*ASK]
    given: Any = GIVEN | {"tools": TOOLS, "messages": messages}
    for kind in ({"type": "tool", "name": "paint"}, {"type": "any"}):
        choice = kind | {"disable_parallel_tool_use": True}
        whole = api.messages.create(**given, tool_choice=choice)
        with api.messages.stream(**given, tool_choice=choice) as stream:
            streamed = stream.get_final_message()
        (call,), (again,) = whole.content, streamed.content
        assert call.type == again.type == "tool_use"
        assert (whole.stop_reason, call.name, call.input) == ("tool_use", again.name, again.input)
        FORMS[call.name].model_validate(call.input)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "done"}]}
        messages += [{"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    last = api.messages.create(**given | {"max_tokens": 8}, tool_choice={"type": "none"})
    assert [block.type for block in last.content] in ([], ["text"])


def test_a_format(api: anthropic.Anthropic) -> None:
    assert isinstance(api.messages.parse(**GIVEN, output_format=Paint).parsed_output, Paint)


def test_errors(api: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        api.messages.create(**GIVEN | {"model": "nobody"})
    assert (unknown.value.type, unknown.value.error_code) == ("not_found_error", "model_not_found")
    assert unknown.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        api.messages.create(**GIVEN | {"messages": [{"role": "user", "content": "x" * 9000}]})
    with pytest.raises(anthropic.NotFoundError):
        api.messages.batches.list()


def test_litellm(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is fetched
    import litellm
    from litellm.llms.custom_httpx.http_handler import HTTPHandler

    tools = [
        {"type": "function", "function": {"name": t["name"], "parameters": t["input_schema"], "strict": True}}
        for t in TOOLS
    ]
    with asyncio.Runner() as runner:
        asyncio.set_event_loop(runner.get_loop())  # the library makes one where there is none, and leaves it open
        http = HTTPHandler(timeout=90)
        given: Any = {"model": "anthropic/tiny", "api_base": server.url, "api_key": "none", "client": http}
        given |= {"messages": ASK, "max_tokens": 1500, "num_retries": 0}
        whole = litellm.completion(**given, tools=tools, tool_choice="required", parallel_tool_calls=False)
        (call,) = whole.choices[0].message.tool_calls
        assert whole.choices[0].finish_reason == "tool_calls"
        FORMS[call.function.name].model_validate_json(call.function.arguments)
        chunks = list(litellm.completion(**given | {"max_tokens": 8}, stream=True))
        joined = litellm.stream_chunk_builder(chunks)
        assert joined.usage.completion_tokens <= 8
        with pytest.raises(litellm.NotFoundError):
            litellm.completion(**given | {"model": "anthropic/nobody"})
        http.close()
        asyncio.set_event_loop(None)
    assert json.loads(call.function.arguments)
