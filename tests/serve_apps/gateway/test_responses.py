"""/v1/responses with the official openai client, unmodified, on scripted engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from loray.bases.registry import BaseModel
from loray.errors import EngineError, Overloaded
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.gateway.scripted import ScriptedEngines, delta, gateway_app
from tests.serve_apps.gateway.test_gateway import CHAT, HELLO, error_of


@pytest.fixture
def with_client(base: BaseModel, tmp_path: Path) -> Callable[..., Any]:
    def run(engines: ScriptedEngines, use: Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, Any]]) -> Any:
        async def main() -> Any:
            app = gateway_app(base, sqlite_catalog(tmp_path), engines)
            transport = httpx.ASGITransport(app)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=transport) as http,
                openai.AsyncOpenAI(base_url="http://test/v1", api_key="-", http_client=http, max_retries=0) as client,
            ):
                return await use(client)

        return asyncio.run(main())

    return run


def test_a_response(with_client: Any, client_of: Any, base: BaseModel) -> None:
    engines = ScriptedEngines(HELLO)

    async def use(client: openai.AsyncOpenAI) -> None:
        response = await client.responses.create(
            model=base.name,
            instructions="be brief",
            input="hi",
            max_output_tokens=9,
            temperature=0,
            metadata={"a": "b"},
        )
        assert response.output_text == "hello"
        assert (response.status, response.metadata, response.store) == ("completed", {"a": "b"}, False)
        assert response.usage is not None
        assert (response.usage.input_tokens, response.usage.output_tokens) == (len(engines.requests[0].prompt_ids), 6)

    with_client(engines, use)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    with client_of(engines) as client:
        client.post("/v1/chat/completions", json={"model": base.name, "messages": chat, "max_tokens": 9})
    of_response, of_chat = engines.requests
    assert of_response.prompt_ids == of_chat.prompt_ids
    assert (of_response.params.max_tokens, of_response.params.temperature) == (9, 0.0)


def test_a_stream(with_client: Any, base: BaseModel) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        async with client.responses.stream(model=base.name, input=CHAT) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        assert [e.type for e in events][:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "hello"
        assert final.output_text == "hello"
        plain = await client.responses.create(model=base.name, input="hi", stream=True)
        assert [e.type async for e in plain][-1] == "response.completed"

    with_client(ScriptedEngines(HELLO), use)


def test_events_have_their_type_and_no_end_mark(client_of: Any, base: BaseModel) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:
        response = client.post("/v1/responses", json={"model": base.name, "input": "hi", "stream": True})
    first, *_, last = response.text.removesuffix("\n\n").split("\n\n")
    assert first.startswith("event: response.created\ndata: {")
    assert last.startswith("event: response.completed\ndata: {")


def test_an_answer_at_its_limit(with_client: Any, base: BaseModel) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        response = await client.responses.create(model=base.name, input="hi", max_output_tokens=2)
        assert response.status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"

    with_client(ScriptedEngines([delta("he", "length")]), use)


def test_errors(with_client: Any, client_of: Any, base: BaseModel) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(model="nobody", input="hi")
        with pytest.raises(openai.BadRequestError) as unsupported:
            await client.responses.create(model=base.name, input="hi", previous_response_id="resp_1")
        assert unsupported.value.param == "previous_response_id"
        with pytest.raises(openai.BadRequestError) as long:
            await client.responses.create(model=base.name, input="x" * 600)
        assert (long.value.param, long.value.code) == ("input", "context_length_exceeded")
        with pytest.raises(openai.BadRequestError) as empty:
            await client.responses.create(model=base.name, input=[])
        assert empty.value.param == "input"

    with_client(ScriptedEngines(HELLO), use)
    with client_of(ScriptedEngines([Overloaded("full", 1)])) as client:
        error_of(client.post("/v1/responses", json={"model": base.name, "input": "hi", "stream": True}), 429)


def test_a_failure_in_the_middle_is_the_last_event(with_client: Any, base: BaseModel) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        events = [e async for e in await client.responses.create(model=base.name, input="hi", stream=True)]
        last = events[-1]
        assert last.type == "response.failed"
        assert last.response.error is not None
        assert (last.response.error.code, last.response.error.message) == ("server_error", "the replica was lost")
        assert last.response.output_text == "a"

    with_client(ScriptedEngines([delta("a"), EngineError("the replica was lost")]), use)
