"""loray.client with a server's responses: when it sends a request again, and what it never sends twice."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from loray.client import CatalogClient, LorayClient
from loray.errors import (
    CatalogError,
    ClusterError,
    ContextLengthExceeded,
    EngineError,
    GrammarTooExpensive,
    LorayError,
    NotFoundError,
    Overloaded,
    RequestError,
)
from loray.schemas.openai import ChatFormat, CompletionFormat, Error, ErrorBody, Usage
from loray.schemas.openai.formats import Choice
from loray.schemas.resources import (
    AliasResource,
    FileResource,
    Problem,
    UploadResource,
    VersionDetail,
    example_of,
    problem_type,
)
from tests.fixtures.answers import delta, fmt
from tests.fixtures.calls import refused
from tests.fixtures.versions import manifest

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
            refused(EngineError, match, next, chunks)


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
        refused(EngineError, r"no answer from http://test .*loray status", client.models)


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [(502, "<html>bad gateway", "HTTP 502: <html>bad gateway"), (200, "[]", "not of this API")],
)
def test_what_is_not_json_is_shown(status: int, text: str, said: str) -> None:
    with client_of(lambda _: httpx.Response(status, text=text)) as client:
        refused(EngineError, said, client.models)


Answer = httpx.Response | type[httpx.TransportError]


@dataclass
class Clock:
    """Instead of `time`: sleeping takes no time."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("loray.client.http.time", clock)
    return clock


@dataclass
class Server:
    """Gives these answers, the last one for ever. `requests`: (method, body) of what has come."""

    answers: Iterator[Answer]
    requests: list[tuple[str, bytes]] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append((request.method, request.read()))
        answer = next(self.answers)
        if isinstance(answer, httpx.Response):
            return answer
        raise answer("broken", request=request)


def server(*answers: Answer) -> Server:
    return Server(itertools.chain(answers, itertools.repeat(answers[-1])))


def retrying(server: Server, retry_s: float | None = None) -> CatalogClient:
    return CatalogClient("http://test", transport=httpx.MockTransport(server), retry_s=retry_s)


def unavailable(**headers: str) -> httpx.Response:
    problem = Problem(type=problem_type(CatalogError), title="away", status=503, detail="the database is away")
    return httpx.Response(503, text=problem.model_dump_json(), headers=headers)


UPLOAD = httpx.Response(200, json=example_of(UploadResource))
VERSION = httpx.Response(201, json=example_of(VersionDetail) | {"manifest": manifest(1).model_dump(mode="json")})
ALIAS = httpx.Response(200, json=example_of(AliasResource))


@pytest.mark.parametrize("first", [unavailable(), httpx.Response(502), httpx.ReadError, httpx.RemoteProtocolError])
def test_what_may_be_sent_twice_is_sent_again(clock: Clock, tmp_path: Path, first: Answer) -> None:
    (tmp_path / "README.md").write_text("all of it")
    calls: list[tuple[Callable[[CatalogClient], object], httpx.Response]] = [
        (lambda c: c.upload("1"), UPLOAD),
        (lambda c: c.begin_upload("a key"), UPLOAD),
        (lambda c: c.put_file("1", tmp_path / "README.md"), httpx.Response(200, json=example_of(FileResource))),
        (lambda c: c.register("tone", upload="1"), VERSION),
        (lambda c: c.promote("tone", "prod", 1), ALIAS),
        (lambda c: list(c.follow("job")), httpx.Response(200, text="a line\n")),
    ]
    for call, answer in calls:
        asked = server(first, first, answer)
        with retrying(asked) as client:
            call(client)
        assert len(asked.requests) == 3
        assert len(set(asked.requests)) == 1  # with the whole body each time
    assert len(clock.slept) == 2 * len(calls)


@pytest.mark.parametrize("first", [unavailable(), httpx.ReadError])
def test_what_may_not_be_sent_twice_is_not(clock: Clock, first: Answer) -> None:
    calls: list[Callable[[CatalogClient], object]] = [
        lambda c: c.begin_upload(),
        lambda c: c.rollback("tone"),
        lambda c: c.promote("tone", "prod", 1, etag='"3"'),
        lambda c: c.promote("tone", "prod", 1, create=True),
        lambda c: c.submit({"name": "tone"}),
    ]
    for call in calls:
        asked = server(first)
        with retrying(asked) as client, pytest.raises((CatalogError, ClusterError)):
            call(client)
        assert len(asked.requests) == 1
    assert clock.slept == []


def test_what_has_not_been_sent_is_sent_again(clock: Clock) -> None:
    asked = server(httpx.ConnectError, ALIAS)
    with retrying(asked) as client:
        client.rollback("tone")
    assert len(asked.requests) == 2


def test_pauses_grow_up_to_a_limit_and_end(clock: Clock) -> None:
    asked = server(httpx.ConnectError)
    with retrying(asked, retry_s=60) as client, pytest.raises(ClusterError, match="no answer from"):
        client.bases()
    assert clock.slept[0] <= 0.25
    assert 4 < max(clock.slept) <= 5
    assert 50 < clock.now <= 60
    asked = server(unavailable(**{"Retry-After": "7"}))
    with retrying(asked) as client, pytest.raises(CatalogError, match="the database is away"):
        client.bases()
    assert len(asked.requests) == 2  # the third would come after the 10 s
    assert clock.slept[-1] >= 7


def test_other_errors_come_at_once(clock: Clock) -> None:
    for answer in (httpx.Response(500), httpx.Response(404), httpx.UnsupportedProtocol):
        asked = server(answer)
        with retrying(asked) as client, pytest.raises(LorayError):
            client.bases()
        assert len(asked.requests) == 1
    with retrying(server(unavailable()), retry_s=0) as client, pytest.raises(CatalogError):
        client.bases()
    assert clock.slept == []
