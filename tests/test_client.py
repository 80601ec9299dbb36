"""loray.client with a server's responses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from loray.client import LorayClient
from loray.errors import (
    ContextLengthExceeded,
    EngineError,
    GrammarTooExpensive,
    NotFoundError,
    Overloaded,
    RequestError,
)
from loray.schemas.openai import ChatFormat, CompletionFormat, Error, ErrorBody, Usage
from loray.schemas.openai.formats import Choice
from tests.fixtures.answers import delta, fmt

CHAT = [{"role": "user", "content": "hi"}]


def client_of(answer: Callable[[httpx.Request], httpx.Response]) -> LorayClient:
    return LorayClient("http://test", api_key="secret", transport=httpx.MockTransport(answer))


def failing(status: int, code: str | None = None, **headers: str) -> LorayClient:
    body = ErrorBody(error=Error(message="why", type="t", param="p", code=code)).to_json()
    return client_of(lambda _: httpx.Response(status, text=body, headers=headers))


def events(*data: str) -> LorayClient:
    text = "".join(f"data: {d}\n\n" for d in data)
    return client_of(lambda _: httpx.Response(200, text=text, headers={"content-type": "text/event-stream"}))


def test_whole_answers() -> None:
    seen: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, json.loads(request.content), request.headers["authorization"]))
        cls = ChatFormat if "chat" in request.url.path else CompletionFormat
        return httpx.Response(
            200, text=fmt(cls).whole([Choice(["hello"], None, "stop", 3, 2)], Usage.of(3, 2)).to_json()
        )

    with client_of(answer) as client:
        assert client.complete("m", "p", max_tokens=3).choices[0].text == "hello"
        assert client.chat("m", CHAT, temperature=0).choices[0].message.content == "hello"
    assert seen == [
        ("/v1/completions", {"model": "m", "prompt": "p", "max_tokens": 3}, "Bearer secret"),
        ("/v1/chat/completions", {"model": "m", "messages": CHAT, "temperature": 0}, "Bearer secret"),
    ]


def test_streams() -> None:
    chunks = [fmt(ChatFormat).opening(0), fmt(ChatFormat).chunk(0, delta("a", None, "stop"))]
    with events(*(c.to_json() for c in chunks), "[DONE]") as client:
        assert [c.choices[0].delta.content for c in client.stream_chat("m", CHAT)] == ["", "a"]
    with events(fmt(CompletionFormat).chunk(0, delta("a")).to_json(), "[DONE]") as client:
        assert [c.choices[0].text for c in client.stream_complete("m", "p")] == ["a"]


def test_a_stream_that_fails_or_is_cut_off() -> None:
    first = fmt(CompletionFormat).chunk(0, delta("a")).to_json()
    lost = ErrorBody(error=Error(message="lost", type="server_error", param=None, code="engine_unavailable")).to_json()
    for rest, match in (([lost], "lost"), ([], "ended early")):
        with events(first, *rest) as client:
            chunks = client.stream_complete("m", "p")
            assert next(chunks).choices[0].text == "a"
            with pytest.raises(EngineError, match=match):
                next(chunks)


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (failing(400), RequestError),
        (failing(400, "context_length_exceeded"), ContextLengthExceeded),
        (failing(400, "grammar_too_expensive"), GrammarTooExpensive),
        (failing(404, "model_not_found"), NotFoundError),
        (failing(429, "overloaded", **{"retry-after": "7"}), Overloaded),
        (failing(503), EngineError),
    ],
)
def test_errors_are_raised_as_on_the_server(client: LorayClient, expected: type[Exception]) -> None:
    with client:
        for call in (lambda: client.complete("m", "p"), lambda: next(client.stream_complete("m", "p"))):
            with pytest.raises(expected, match="why") as e:
                call()
            assert type(e.value) is expected
            if isinstance(e.value, Overloaded):
                assert e.value.retry_after_s == 7
            if isinstance(e.value, RequestError):
                assert e.value.param == "p"


def test_no_server() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with client_of(refuse) as client:
        assert not client.is_healthy()
        with pytest.raises(EngineError, match=r"no answer from http://test .*loray status"):
            client.models()


def test_what_is_not_json_is_shown() -> None:
    with (
        client_of(lambda _: httpx.Response(502, text="<html>bad gateway")) as client,
        pytest.raises(EngineError, match="HTTP 502: <html>bad gateway"),
    ):
        client.models()
    with (
        client_of(lambda _: httpx.Response(200, text="[]")) as client,
        pytest.raises(EngineError, match="not of this API"),
    ):
        client.models()
