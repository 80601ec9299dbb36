"""What a reasoning model thinks is apart from its answer: chats, streams, the Responses API, and who asks how much."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.engine.async_engine import AsyncEngine
from loray.errors import SpecError
from loray.spec import GenerateRequest, TokenDelta, TokenLogprobs
from serve_apps.replica.metrics import ReplicaMetrics
from serve_apps.replica.requests import LocalStreams, ReplicaRequests
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.engines import make_engine
from tests.fixtures.gateway import CHAT, GatewayClient, ScriptedEngines, events_of, gateway_app, openai_of
from tests.fixtures.thinking import END_THINK, EOS, QWEN3, THINK, Wishes, text_ids, thinking_tokenizer

THOUGHT, CONTENT = "I add 1 and 2.", "It is 3."
ANSWER = f"<think>\n{THOUGHT}\n</think>\n\n{CONTENT}"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}}}}}
NUM_THOUGHT = len(text_ids(f"\n{THOUGHT}\n"))


def script(answer: str = ANSWER, size: int = 5, end: bool = True) -> list[TokenDelta]:
    """The deltas of an answer, some of which end in the middle of a thought and of a character."""
    ids = [*text_ids(answer), *([EOS] if end else [])]
    pieces = [tuple(ids[i : i + size]) for i in range(0, len(ids), size)]
    scores = [tuple(TokenLogprobs(-1.0, (), 1) for _ in piece) for piece in pieces]
    deltas = [TokenDelta(piece, logprobs=score) for piece, score in zip(pieces, scores, strict=True)]
    return [*deltas[:-1], deltas[-1]._replace(finish_reason="stop" if end else "length")]


class ByChoice(ScriptedEngines):
    """A script for each choice."""

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append(request)
        for item in script(ANSWERS[int(request.request_id.rpartition("-")[2])]):
            await asyncio.sleep(0)
            yield item


ANSWERS = [f"<think>{'hm ' * i}</think>{'so ' * (4 - i)}" for i in range(3)] + ["no thought"]
ClientOf = Callable[..., Any]


@pytest.fixture
def client_of(thinking_base: Callable[[str], BaseModel], tmp_path: Path) -> ClientOf:
    @contextmanager
    def make(engines: ScriptedEngines, name: str = "qwen3", **spec: Any) -> Iterator[GatewayClient]:
        base = thinking_base(name)
        app = gateway_app(base, sqlite_catalog(tmp_path), engines, **spec)
        with GatewayClient(app, raise_server_exceptions=False) as client:
            client.base = base.name
            yield client

    return make


def prompt_of(engines: ScriptedEngines) -> str:
    return str(thinking_tokenizer(QWEN3).decode(engines.requests[-1].prompt_ids))


def joined(events: Sequence[Any]) -> list[dict[str, Any]]:
    """The message of each choice of a stream, as clients join it, with its finish reason."""
    out: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"] if event != "[DONE]" else ():
            message = out.setdefault(choice["index"], {"content": "", "reasoning": ""})
            delta = choice["delta"]
            assert not (delta.get("reasoning") and delta.get("content"))
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for name in ("content", "reasoning"):
                message[name] += delta.get(name) or ""
            message["finish_reason"] = choice["finish_reason"]
    return [out[i] for i in sorted(out)]


@pytest.mark.parametrize("size", [1, 2, 7, 99])
def test_streams_are_equal_to_whole_answers(client_of: ClientOf, size: int) -> None:
    with client_of(ScriptedEngines(script(size=size))) as client:
        body = client.chat(max_tokens=99).json()
        events = events_of(client.chat(max_tokens=99, stream=True, stream_options={"include_usage": True}))
        hidden = client.chat(max_tokens=99, include_reasoning=False).json()
        unseen = events_of(client.chat(max_tokens=99, include_reasoning=False, stream=True))
    message = body["choices"][0]["message"]
    said = {"role": "assistant", "content": CONTENT, "refusal": None}
    assert message == said | {"reasoning": THOUGHT, "reasoning_content": THOUGHT}
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": NUM_THOUGHT}
    assert joined(events) == [{"content": CONTENT, "reasoning": THOUGHT, "finish_reason": "stop"}]
    assert events[-2]["usage"] == body["usage"]
    assert hidden["choices"][0]["message"] == said
    assert hidden["usage"] == body["usage"]
    assert joined(unseen) == [{"content": CONTENT, "reasoning": "", "finish_reason": "stop"}]
    assert not any("reasoning" in json.dumps(event) for event in unseen)


def test_a_message_has_a_block_of_it(client_of: ClientOf) -> None:
    engines = ScriptedEngines(script())
    with client_of(engines) as client:

        def ask(**fields: Any) -> Any:
            asked = {"model": client.base, "max_tokens": 2000, "messages": CHAT} | fields
            return client.post("/v1/messages", json=asked | {"thinking": {"type": "enabled", "budget_tokens": 1024}})

        whole = ask().json()
        lines = ask(stream=True).text.removesuffix("\n\n").split("\n\n")
        turn = {"role": "assistant", "content": whole["content"]}
        counted = {"model": client.base, "messages": CHAT}
        assert client.post("/v1/messages/count_tokens", json=counted).status_code == 200
        ask(messages=[*CHAT, turn, *CHAT])
        off = {"model": client.base, "max_tokens": 9, "messages": CHAT, "thinking": {"type": "disabled"}}
        client.post("/v1/messages", json=off)
    thought, text = whole["content"]
    assert (thought["type"], thought["thinking"], text) == ("thinking", THOUGHT, {"type": "text", "text": CONTENT})
    assert whole["usage"]["output_tokens_details"] == {"thinking_tokens": NUM_THOUGHT}
    deltas = [e["delta"] for e in (json.loads(line.partition("data: ")[2]) for line in lines) if "delta" in e]
    assert "".join(d.get("thinking", "") for d in deltas) == THOUGHT
    assert "".join(d.get("text", "") for d in deltas) == CONTENT
    assert [d["signature"] for d in deltas if "signature" in d] == [thought["signature"]]
    budgets = [r.params.thinking and r.params.thinking.budget for r in engines.requests]
    assert budgets[:3] == [1024] * 3
    assert prompt_of(engines).endswith("<think>\n\n</think>\n\n")


def test_each_of_several_choices_has_its_own(client_of: ClientOf) -> None:
    with client_of(ByChoice()) as client:
        body = client.chat(n=4).json()
        events = events_of(client.chat(n=4, stream=True))
    expected = [{"content": "so " * (4 - i), "reasoning": "hm " * i, "finish_reason": "stop"} for i in range(3)] + [
        {"content": "no thought", "reasoning": "", "finish_reason": "stop"}
    ]
    assert joined(events) == expected
    assert [c["message"].get("reasoning", "") for c in body["choices"]] == [e["reasoning"] for e in expected]
    assert [c["message"]["content"] for c in body["choices"]] == [e["content"] for e in expected]
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3 + 6}


def test_a_thought_that_never_ends_is_no_content(client_of: ClientOf) -> None:
    with client_of(ScriptedEngines(script("\nI add", end=False)), "deepseek_r1") as client:
        (choice,) = client.chat().json()["choices"]
        (hidden,) = client.chat(include_reasoning=False).json()["choices"]
        assert joined(events_of(client.chat(stream=True)))[0]["reasoning"] == "I add"
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == (None, "I add")
    assert choice["finish_reason"] == "length"
    assert hidden["message"] == {"role": "assistant", "content": None, "refusal": None}


def test_log_probabilities_and_token_ids_are_those_of_all_tokens(client_of: ClientOf) -> None:
    ids = [*text_ids(ANSWER), EOS]
    with client_of(ScriptedEngines(script())) as client:
        fields: dict[str, Any] = {"logprobs": True, "return_token_ids": True}
        (choice,) = client.chat(**fields).json()["choices"]
        chunks = [e["choices"][0] for e in events_of(client.chat(stream=True, **fields))[:-1]]
        usage = events_of(
            client.chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
        )
    assert choice["token_ids"] == ids
    assert len(choice["logprobs"]["content"]) == len(ids)
    assert [t for c in chunks for t in c.get("token_ids", ())] == ids
    assert sum(len(c["logprobs"]["content"]) for c in chunks if c["logprobs"]) == len(ids)
    assert usage[-3]["usage"]["completion_tokens_details"] == {"reasoning_tokens": NUM_THOUGHT}


def test_calls_come_after_the_thought(client_of: ClientOf) -> None:
    engines = ScriptedEngines(script(f"<think>\nNot {CALL}\n</think>\n\n{CALL}"))
    with client_of(engines) as client:
        (choice,) = client.chat(tools=[ADD]).json()["choices"]
        assert engines.requests[-1].params.thinking is None  # nothing for the engine to do
        for fields in ({"tool_choice": "required"}, {"response_format": {"type": "json_object"}}):
            assert client.chat(tools=[ADD], **fields).status_code == 200
            params = engines.requests[-1].params
            assert params.structured is not None
            assert params.thinking is not None
            assert (params.thinking.start_id, params.thinking.end_id) == (THINK, END_THINK)
    message = choice["message"]
    assert message["reasoning"] == f"Not {CALL}"
    assert message["content"] is None
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "add", "arguments": '{"a": 1}'}]


OFF = {"enable_thinking": False}


def test_who_asks_says_how_long_it_thinks(client_of: ClientOf) -> None:
    engines = ScriptedEngines(script(CONTENT))

    def asked(client: GatewayClient, **fields: Any) -> tuple[str, int | None] | None:
        response = client.chat(**fields)
        assert response.status_code == 200, response.text
        assert "x-loray-ignored-fields" not in response.headers
        thinking = engines.requests[-1].params.thinking
        return None if thinking is None else (thinking.state, thinking.budget)

    held: dict[str, Any] = {"response_format": {"type": "json_object"}}
    with client_of(engines) as client:
        assert asked(client) is None
        assert asked(client, **held) == ("may be", None)
        assert asked(client, reasoning_effort="low") == ("may be", 1024)
        assert asked(client, reasoning_effort="high", thinking_token_budget=9) == ("may be", 9)
        assert prompt_of(engines).endswith("assistant\n")
        for off in ({"reasoning_effort": "none"}, {"chat_template_kwargs": OFF, "reasoning_effort": "high"}):
            assert asked(client, **off, **held) is None  # the constraint begins with the first token
            assert prompt_of(engines).endswith("<think>\n\n</think>\n\n")
        said = {"role": "assistant", "content": "3", "reasoning_content": THOUGHT}
        client.chat(messages=[*CHAT, said], add_generation_prompt=False)
        assert f"<think>\n{THOUGHT}\n</think>\n\n3" in prompt_of(engines)
    with client_of(engines, "deepseek_r1") as client:
        assert asked(client) is None
        assert asked(client, reasoning_effort="medium") == ("open", 8192)
        assert asked(client, chat_template_kwargs=OFF) == ("open", 0)
        assert asked(client, chat_template_kwargs=OFF, **held) == ("open", 0)


def test_a_base_that_does_not_think_says_what_it_ignores(base: BaseModel, tmp_path: Path, client_of: ClientOf) -> None:
    engines = ScriptedEngines(script("<think>a</think>b"))
    with GatewayClient(gateway_app(base, sqlite_catalog(tmp_path), engines)) as client:
        client.base = base.name
        given: dict[str, Any] = {"reasoning_effort": "low", "thinking_token_budget": 5, "chat_template_kwargs": OFF}
        response = client.chat(**given, include_reasoning=False)
        ignored = response.headers["x-loray-ignored-fields"]
        assert ignored == "reasoning_effort, thinking_token_budget, chat_template_kwargs.enable_thinking"
        assert engines.requests[-1].params.thinking is None
        assert "x-loray-ignored-fields" not in client.chat(include_reasoning=False).headers
    with pytest.raises(SpecError, match="reasoning_parser qwen3: <think> and </think> are no tokens"):
        gateway_app(base, sqlite_catalog(tmp_path), engines, reasoning_parser="qwen3")
    with client_of(engines, reasoning_parser="deepseek_r1") as client:
        assert client.chat().json()["choices"][0]["message"]["reasoning"] == "a"
        assert client.complete().json()["choices"][0]["text"] == "<think>a</think>b"  # completions are not parsed


class OneEngine(ScriptedEngines):
    """The engine of this process."""

    def __init__(self, stream: AsyncEngine) -> None:
        super().__init__()
        self._streams = LocalStreams(ReplicaRequests(stream, ReplicaMetrics()))

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        async with aclosing(self._streams.generate(request, fit=fit)) as deltas:
            async for delta in deltas:
                yield delta


NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
STRICT = {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER, "strict": True}}
STRICT_ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": NUMBER, "strict": True}}
SAID = '{"a"'
# what is asked; what the model wants to think and to say; what it has thought and said; the arguments of its calls
WANTED: dict[str, tuple[dict[str, Any], str, str, str, str | None, list[str]]] = {
    "text": ({}, f"{SAID}</think>", "\n\nSo.", SAID, "So.", []),
    "schema": ({"response_format": STRICT}, f"{SAID}</think>", '{"a": 7}', SAID, '{"a": 7}', []),
    "cut": ({"response_format": STRICT}, SAID, '{"a": 7}', SAID, '{"a": 7}', []),
    "budget": ({"thinking_token_budget": 1}, f"{SAID}</think>", "So.", "{", "So.", []),
    "call": ({"tool_choice": "required"}, f"{SAID}</think>", CALL, SAID, None, ['{"a": 1}']),
    "free": ({}, f"{CALL}</think>", f"So.{CALL}", CALL, "So.", ['{"a": 1}']),
    "stop": ({"stop": ["{", "o"]}, f"{SAID}</think>", "So.", SAID, "S", []),
}


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1"])
def test_an_engine_that_wants_certain_tokens(
    thinking_base: Callable[[str], BaseModel], tmp_path: Path, name: str
) -> None:
    """From the template to the message, streamed or not; the model opens its thought where the template does not."""
    base = thinking_base(name)
    opened = [THINK] if name == "qwen3" else []

    def wanted(request_id: str) -> tuple[list[int], list[int]]:
        _, thought, content, *_ = WANTED[request_id.partition("-")[0]]
        return [*opened, *text_ids(thought)], text_ids(content)

    engine = make_engine(base)
    Wishes(engine, wanted)
    stream = AsyncEngine(engine)
    stream.start()
    with GatewayClient(gateway_app(base, sqlite_catalog(tmp_path), OneEngine(stream))) as client:
        client.base = base.name
        for case, (fields, _, _, thought, content, calls) in WANTED.items():
            asked: dict[str, Any] = {"max_tokens": 200, "temperature": 0, "tools": [STRICT_ADD], **fields}
            asked |= {"tools": []} if "response_format" in fields or case in ("text", "budget", "stop") else {}
            headers = {"X-Request-Id": case}
            (choice,) = client.chat(headers, **asked).json()["choices"]
            message = choice["message"]
            assert (message["reasoning"], message["content"]) == (thought, content), case
            assert [c["function"]["arguments"] for c in message.get("tool_calls", ())] == calls
            assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
            (streamed,) = joined(events_of(client.chat(headers, stream=True, **asked)))
            finish = {"finish_reason": choice["finish_reason"]}
            assert streamed == {"content": content or "", "reasoning": thought} | finish
    stream.stop()


async def test_openais_client_reads_thoughts(thinking_base: Callable[[str], BaseModel], tmp_path: Path) -> None:
    base = thinking_base("qwen3")
    answer = f"<think>\n{THOUGHT}\n</think>\n\n{CONTENT}{CALL}"
    tool = {"type": "function", "name": "add", "parameters": {"type": "object"}}
    engines = ScriptedEngines(script(answer, 4))
    async with openai_of(gateway_app(base, sqlite_catalog(tmp_path), engines)) as client:
        asked: dict[str, Any] = {"model": base.name, "input": "1 + 2?", "tools": [tool], "reasoning": {"effort": "low"}}
        whole = await client.responses.create(**asked)
        async with client.responses.stream(**asked) as stream:
            kinds = [event.type async for event in stream]
            streamed = await stream.get_final_response()
        items = [item.to_dict() for item in whole.output]
        again = [{"role": "user", "content": "1 + 2?"}, *items, {"type": "function_call_output", "output": "3"}]
        again[-1]["call_id"] = items[-1]["call_id"]
        await client.responses.create(**asked | {"input": again})
        chat = await client.chat.completions.create(model=base.name, messages=CHAT, reasoning_effort="medium")
    assert engines.requests[0].params.thinking is not None
    assert f"<think>\n{THOUGHT}\n</think>\n\n{CONTENT}" in prompt_of_index(engines, 2)
    for response in (whole, streamed):
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
        assert response.output[0].content[0].text == THOUGHT
        assert response.output_text == CONTENT
        assert response.usage.output_tokens_details.reasoning_tokens == NUM_THOUGHT
        assert response.reasoning.effort == "low"
    first, last = kinds.index("response.reasoning_text.delta"), kinds.index("response.reasoning_text.done")
    assert first < last < kinds.index("response.output_text.delta")
    assert chat.usage.completion_tokens_details.reasoning_tokens == NUM_THOUGHT
    assert chat.choices[0].message.reasoning_content == THOUGHT


def prompt_of_index(engines: ScriptedEngines, index: int) -> str:
    return str(thinking_tokenizer(QWEN3).decode(engines.requests[index].prompt_ids))
