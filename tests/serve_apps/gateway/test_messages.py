"""Anthropic's Messages API: its client unmodified, and what is on the wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import anthropic
import pytest
from fastapi import FastAPI

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import DeadlineExceeded, EngineError, Overloaded
from loray.spec import Limits
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import CHAT, HELLO, ScriptedEngines, anthropic_of, delta, gateway_app, register
from tests.fixtures.keys import access_of

ADD: Any = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
VERSION = {"anthropic-version": "2023-06-01"}


@pytest.fixture
def app_of(base: BaseModel, tmp_path: Path) -> Callable[..., FastAPI]:
    url = sqlite_catalog(tmp_path)

    def make(*script: Any, served: BaseModel = base, **spec: Any) -> FastAPI:
        return gateway_app(served, url, ScriptedEngines(script or HELLO), **spec)

    return make


def ask(base: BaseModel, **fields: Any) -> Any:
    return {"model": base.name, "max_tokens": 20, "messages": CHAT} | fields


def error_of(response: Any, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"type", "error", "request_id"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert body["request_id"] == response.headers["request-id"]
    return str(body["error"]["message"])


async def test_a_message(app_of: Any, client_of: Any, base: BaseModel) -> None:
    engines = ScriptedEngines([delta("hel")._replace(num_cached_tokens=4), HELLO[1]._replace(num_cached_tokens=4)])
    asked = ask(base, system="be brief", metadata={"user_id": "u"})
    with client_of(engines) as client:
        more = {"seed": 3, "temperature": 0.5}
        response = client.post("/v1/messages", json=asked | more, headers={"X-Request-Id": "mine"})
        client.chat(messages=[{"role": "system", "content": "be brief"}, *CHAT], max_tokens=20, seed=3, temperature=0.5)
    of_message, of_chat = engines.requests
    assert (of_message.prompt_ids, of_message.params) == (of_chat.prompt_ids, of_chat.params)
    assert of_message.tenant == "u"
    assert (response.headers["request-id"], response.headers["x-request-id"]) == ("mine", "mine")
    usage = {"input_tokens": len(of_chat.prompt_ids) - 4, "cache_creation_input_tokens": 0}
    usage |= {"cache_read_input_tokens": 4, "output_tokens": 6}
    assert response.json() == {
        "id": response.json()["id"],
        "type": "message",
        "role": "assistant",
        "model": base.name,
        "content": [{"type": "text", "text": "hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": usage,
    }
    async with anthropic_of(app_of()) as sdk:
        message = await sdk.messages.create(**asked)
        assert (message.content[0].text, message._request_id) == ("hello", message.id)  # type: ignore[union-attr]
        assert message.usage.output_tokens == 6
        begun = await sdk.messages.create(**ask(base, messages=[*CHAT, {"role": "assistant", "content": "he"}]))
        assert begun.usage.input_tokens > 0


def test_events(client_of: Any, base: BaseModel) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:
        response = client.post("/v1/messages", json=ask(base, stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.split("\n") for line in response.text.removesuffix("\n\n").split("\n\n")]
    bodies = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name for name, _ in events] == [f"event: {body['type']}" for body in bodies]
    start, stop = bodies[0]["message"], bodies[-2]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 3)
    assert bodies[1:-2] == [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hel"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
        {"type": "content_block_stop", "index": 0},
    ]
    assert stop["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert stop["usage"] == start["usage"] | {"output_tokens": 6}
    assert bodies[-1] == {"type": "message_stop"}


async def test_streams_of_the_client(app_of: Any, base: BaseModel) -> None:
    async with anthropic_of(app_of()) as client:
        async with client.messages.stream(**ask(base)) as stream:
            assert "".join([text async for text in stream.text_stream]) == "hello"
            final = await stream.get_final_message()
        assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 6)
        plain = await client.messages.create(**ask(base, stream=True))
        assert [event.type async for event in plain][-1] == "message_stop"
        beta = await client.beta.messages.create(**ask(base), betas=["fine-grained-tool-streaming-2025-05-14"])
        assert beta.content[0].text == "hello"  # type: ignore[union-attr]


async def test_silence_is_filled_with_pings(base: BaseModel, tmp_path: Path) -> None:
    engines, goes_on = ScriptedEngines(HELLO), asyncio.Event()
    generate = engines.generate

    async def later(*args: Any, **fields: Any) -> Any:
        await goes_on.wait()
        async for tokens in generate(*args, **fields):
            yield tokens

    engines.generate = later  # type: ignore[method-assign]
    app = gateway_app(base, sqlite_catalog(tmp_path), engines, sse_heartbeat_s=0.01)
    async with anthropic_of(app) as client:

        async def watch(scope: Any, receive: Any, send: Any) -> None:
            async def seen(message: Any) -> None:
                if b"event: ping" in message.get("body", b""):
                    goes_on.set()
                await send(message)

            await app(scope, receive, seen)

        client._client._transport.app = watch  # type: ignore[attr-defined]
        async with client.messages.stream(**ask(base)) as stream:
            assert await stream.get_final_text() == "hello"


async def test_a_loop_with_a_tool(app_of: Any, long_base: BaseModel) -> None:
    """The client's own, which sends each call's result back until an answer calls nothing."""
    app = app_of(served=long_base)
    engines = next(iter(app.state.gateway.bases.values())).engines
    answers = [[delta(f"Hm. {CALL}", "stop")], [delta("It is 2.", "stop")]] * 2
    generate = engines.generate

    async def next_answer(*args: Any, **fields: Any) -> Any:
        engines.script = answers.pop(0)
        async for tokens in generate(*args, **fields):
            yield tokens

    engines.generate = next_answer

    @anthropic.beta_async_tool
    async def add(a: int) -> str:
        """Add one.

        Args:
            a: the number
        """
        return str(a + 1)

    async with anthropic_of(app) as client:
        for stream in (False, True):
            runner: Any = client.beta.messages.tool_runner(**ask(long_base), tools=[add], stream=stream)
            messages = [await turn.get_final_message() if stream else turn async for turn in runner]
            call, last = messages
            assert [block.type for block in call.content] == ["text", "tool_use"]
            assert (call.stop_reason, call.content[1].input) == ("tool_use", {"a": 1})
            assert (last.stop_reason, last.content[0].text) == ("end_turn", "It is 2.")
    first, second = (bytes(t for t in r.prompt_ids if t < 256) for r in engines.requests[:2])
    assert second.startswith(first[: len(first) // 2])
    assert not answers


async def test_why_answers_end(app_of: Any, base: BaseModel) -> None:
    async with anthropic_of(app_of(delta("he\n", "stop"))) as client:
        stopped = await client.messages.create(**ask(base, stop_sequences=["\n"]))
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "\n")
    app = app_of(delta("he", "length"))
    async with anthropic_of(app) as client:
        assert (await client.messages.create(**ask(base, max_tokens=2))).stop_reason == "max_tokens"
        full = await client.messages.create(**ask(base, max_tokens=100_000), timeout=60)
        assert full.stop_reason == "model_context_window_exceeded"
    engines = next(iter(app.state.gateway.bases.values())).engines
    asked = engines.requests[-1]
    assert asked.params.max_tokens == 512 - len(asked.prompt_ids)
    assert engines.fits == [True, True]


async def test_tokens_are_counted(app_of: Any, client_of: Any, long_base: BaseModel, base: BaseModel) -> None:
    app = app_of(served=long_base)
    fields: Any = {"model": long_base.name, "system": "be brief", "messages": CHAT, "tools": [ADD]}
    async with anthropic_of(app) as client:
        counted = await client.messages.count_tokens(**fields)
        message = await client.messages.create(**fields, max_tokens=9)
    assert counted.input_tokens == message.usage.input_tokens
    with client_of(ScriptedEngines()) as client:
        asked = {"model": base.name, "messages": CHAT}
        answer = client.post("/v1/messages/count_tokens", json=asked)
        assert answer.json() == {"input_tokens": client.post("/tokenize", json=asked).json()["count"]}
        wrong = client.post("/v1/messages/count_tokens", json={"model": base.name})
        assert "'messages' is required" in error_of(wrong, 400, "invalid_request_error")


async def test_models(app_of: Any, client_of: Any, base: BaseModel, catalog: Catalog) -> None:
    for i in range(25):
        register(catalog, f"a{i:02d}", base.fingerprint)
    names = [base.name, *(f"a{i:02d}" for i in range(25))]
    async with anthropic_of(app_of()) as client:
        page = await client.models.list()
        assert ([m.id for m in page.data], page.has_more) == (names[:20], True)
        assert [model.id async for model in await client.models.list(limit=7)] == names
        found = await client.models.retrieve("a03@1")
        assert (found.id, found.display_name, found.max_input_tokens) == ("a03@1", "a03@1", 512)
        with pytest.raises(anthropic.NotFoundError):
            await client.models.retrieve("nobody")
        with pytest.raises(anthropic.BadRequestError, match="after_id"):
            await client.models.list(before_id="a03")
    with client_of(ScriptedEngines()) as raw:
        listed = raw.get("/v1/models?limit=2", headers=VERSION).json()
        assert listed.keys() == {"data", "first_id", "last_id", "has_more"}
        assert listed["data"][1].keys() == {
            *("type", "id", "display_name", "created_at", "lifecycle", "max_input_tokens", "max_tokens")
        }
        assert raw.get("/v1/models").json()["object"] == "list"


async def test_keys(base: BaseModel, tmp_path: Path) -> None:
    url = sqlite_catalog(tmp_path)
    with closing(Catalog(url)) as catalog:
        catalog.tenants.create("acme")
        good, reader = catalog.keys.create("good", scopes=["infer"]), catalog.keys.create("reader", scopes=["publish"])
        limits = Limits(rpm_limit=2, tpm_limit=100_000)
        limited = catalog.keys.create("limited", scopes=["infer"], limits=limits)
        budget = Limits(max_budget=1, budget_duration="30d")
        poor = catalog.keys.create("poor", scopes=["infer"], limits=budget)
    access = access_of(url, host="0.0.0.0")
    app = gateway_app(base, url, ScriptedEngines(HELLO), access=access)

    async def refusal(client: anthropic.AsyncAnthropic, **fields: Any) -> anthropic.APIStatusError:
        with pytest.raises(anthropic.APIStatusError) as e:
            await client.messages.create(**ask(base, **fields))
        assert e.value.request_id is not None
        return e.value

    async with anthropic_of(app, api_key=good.secret) as client:
        assert (await client.messages.create(**ask(base))).stop_reason == "end_turn"
        older: Any = {"default_headers": {"x-api-key": good.secret, "Authorization": anthropic.omit}}
        assert (await client.with_options(**older).messages.create(**ask(base))).stop_reason == "end_turn"
        wrong = await refusal(client.with_options(api_key="sk-lr-wrong"))
        assert (wrong.status_code, wrong.type) == (401, "authentication_error")
        may_not = await refusal(client.with_options(api_key=reader.secret))
        assert (may_not.status_code, may_not.type) == (403, "permission_error")
        used_up = await refusal(client.with_options(api_key=poor.secret, max_retries=3))
        assert (used_up.status_code, used_up.type) == (402, "billing_error")
        slow = client.with_options(api_key=limited.secret)
        answer = await slow.messages.with_raw_response.create(**ask(base))
        assert answer.headers["anthropic-ratelimit-requests-limit"] == "2"
        assert answer.headers["anthropic-ratelimit-requests-remaining"] == "1"
        assert int(answer.headers["anthropic-ratelimit-tokens-remaining"]) < 100_000
        reset = datetime.fromisoformat(answer.headers["anthropic-ratelimit-requests-reset"])
        assert timedelta(seconds=10) < reset - datetime.now(UTC) < timedelta(minutes=1)
        await slow.messages.create(**ask(base))
        refused = await refusal(slow)
        assert (refused.status_code, refused.type) == (429, "rate_limit_error")
        assert int(refused.response.headers["retry-after"]) > 0
        assert refused.response.headers["anthropic-ratelimit-requests-remaining"] == "0"
    async with anthropic_of(app, api_key=None, auth_token=good.secret) as client:
        assert (await client.messages.create(**ask(base))).stop_reason == "end_turn"
    access.close()


async def test_what_is_refused(app_of: Any, base: BaseModel) -> None:
    async with anthropic_of(app_of()) as client:
        with pytest.raises(anthropic.NotFoundError, match="does not exist"):
            await client.messages.create(**ask(base, model="nobody"))
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
            await client.messages.create(**ask(base, messages=[{"role": "user", "content": "x" * 600}]))
        image: Any = {"type": "image", "source": {"type": "url", "url": "http://test/a.png"}}
        with pytest.raises(anthropic.BadRequestError, match="of type 'image' is not supported"):
            await client.messages.create(**ask(base, messages=[{"role": "user", "content": [image]}]))
        with pytest.raises(anthropic.BadRequestError, match="web_search"):
            await client.messages.create(**ask(base, tools=[{"type": "web_search_20250305", "name": "web_search"}]))
        with pytest.raises(anthropic.APIStatusError) as e:
            await client.beta.messages.create(**ask(base), thread={"type": "create"})
        assert e.value.error_code == "thread_unsupported_request"  # which its tool runner takes as a no
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.batches.list()


def test_the_form_of_errors(client_of: Any, base: BaseModel) -> None:
    with client_of(ScriptedEngines(HELLO), max_body_bytes=1000) as client:
        assert "not valid JSON" in error_of(
            client.post("/v1/messages", content=b"{", headers={"content-type": "application/json"}),
            400,
            "invalid_request_error",
        )
        error_of(client.post("/v1/messages", json=ask(base, messages=CHAT * 100)), 413, "request_too_large")
        error_of(client.post("/v1/messages/batches", json={}), 404, "not_found_error")
        error_of(client.get("/v1/complete", headers=VERSION), 404, "not_found_error")
        answer = client.get("/v1/messages", headers={"X-Request-Id": "mine"})
        error_of(answer, 405, "invalid_request_error")
        assert (answer.headers["allow"], answer.headers["request-id"]) == ("POST", "mine")
        assert client.get("/v1/complete").json().keys() == {"error"}


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("busy", 2.0), 529, "overloaded_error"),
        (EngineError("away"), 529, "overloaded_error"),
        (DeadlineExceeded("late"), 504, "timeout_error"),
        (RuntimeError("secret"), 500, "api_error"),
    ],
)
def test_failures_before_and_after_the_first_event(
    client_of: Any, base: BaseModel, error: Exception, status: int, kind: str
) -> None:
    with client_of(ScriptedEngines([error])) as client:
        answer = client.post("/v1/messages", json=ask(base, stream=True))
        assert "secret" not in error_of(answer, status, kind)
        assert ("retry-after" in answer.headers) == (status == 529)
    with client_of(ScriptedEngines([delta("he"), error])) as client:
        *_, last = client.post("/v1/messages", json=ask(base, stream=True)).text.removesuffix("\n\n").split("\n\n")
        event, data = last.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert (event, body["type"], body["error"]["type"]) == ("event: error", "error", kind)


def test_an_unexpected_error_of_a_route(client_of: Any, base: BaseModel) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:
        client.app.state.gateway.model = AsyncMock(side_effect=RuntimeError("secret"))
        answer = client.post("/v1/messages/count_tokens", json={"model": base.name, "messages": CHAT})
        assert "secret" not in error_of(answer, 500, "api_error")
