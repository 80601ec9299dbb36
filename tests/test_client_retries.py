"""When loray.client sends a request again, how long it waits, and what it never sends twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from loray.client import CatalogClient
from loray.errors import CatalogError, ClusterError, LorayError
from loray.schemas.resources import Problem, problem_type
from serve_apps.api import examples
from tests.fixtures.versions import manifest

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


def client_of(server: Server, retry_s: float | None = None) -> CatalogClient:
    return CatalogClient("http://test", transport=httpx.MockTransport(server), retry_s=retry_s)


def unavailable(**headers: str) -> httpx.Response:
    problem = Problem(type=problem_type(CatalogError), title="away", status=503, detail="the database is away")
    return httpx.Response(503, text=problem.model_dump_json(), headers=headers)


UPLOAD = httpx.Response(200, json=examples.UPLOAD)
VERSION = httpx.Response(201, json=examples.VERSION_DETAIL | {"manifest": manifest(1).model_dump(mode="json")})
ALIAS = httpx.Response(200, json=examples.ALIAS)


@pytest.mark.parametrize("first", [unavailable(), httpx.Response(502), httpx.ReadError, httpx.RemoteProtocolError])
def test_what_may_be_sent_twice_is_sent_again(clock: Clock, tmp_path: Path, first: Answer) -> None:
    (tmp_path / "README.md").write_text("all of it")
    calls: list[tuple[Callable[[CatalogClient], object], httpx.Response]] = [
        (lambda c: c.upload("1"), UPLOAD),
        (lambda c: c.begin_upload("a key"), UPLOAD),
        (lambda c: c.put_file("1", tmp_path / "README.md"), httpx.Response(200, json=examples.FILE)),
        (lambda c: c.register("tone", upload="1"), VERSION),
        (lambda c: c.promote("tone", "prod", 1), ALIAS),
        (lambda c: list(c.follow("job")), httpx.Response(200, text="a line\n")),
    ]
    for call, answer in calls:
        asked = server(first, first, answer)
        with client_of(asked) as client:
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
        with client_of(asked) as client, pytest.raises((CatalogError, ClusterError)):
            call(client)
        assert len(asked.requests) == 1
    assert clock.slept == []


def test_what_has_not_been_sent_is_sent_again(clock: Clock) -> None:
    asked = server(httpx.ConnectError, ALIAS)
    with client_of(asked) as client:
        client.rollback("tone")
    assert len(asked.requests) == 2


def test_pauses_grow_up_to_a_limit_and_end(clock: Clock) -> None:
    asked = server(httpx.ConnectError)
    with client_of(asked, retry_s=60) as client, pytest.raises(ClusterError, match="no answer from"):
        client.bases()
    assert clock.slept[0] <= 0.25
    assert 4 < max(clock.slept) <= 5
    assert 50 < clock.now <= 60
    asked = server(unavailable(**{"Retry-After": "7"}))
    with client_of(asked) as client, pytest.raises(CatalogError, match="the database is away"):
        client.bases()
    assert len(asked.requests) == 2  # the third would come after the 10 s
    assert clock.slept[-1] >= 7


def test_other_errors_come_at_once(clock: Clock) -> None:
    for answer in (httpx.Response(500), httpx.Response(404), httpx.UnsupportedProtocol):
        asked = server(answer)
        with client_of(asked) as client, pytest.raises(LorayError):
            client.bases()
        assert len(asked.requests) == 1
    with client_of(server(unavailable()), retry_s=0) as client, pytest.raises(CatalogError):
        client.bases()
    assert clock.slept == []
