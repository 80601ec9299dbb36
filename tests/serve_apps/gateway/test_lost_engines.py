"""What a client gets where the replica of a real engine dies in the middle of its answer: the undisturbed one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient
from ray.exceptions import ActorDiedError

from loray.bases.registry import BaseModel
from loray.engine.async_engine import AsyncEngine
from loray.engine.request import TokenOutput
from loray.spec import GenerateRequest
from serve_apps.channel.connection import Connection, connect
from serve_apps.channel.frames import ChannelAddress
from serve_apps.gateway.replicas.engines import ServeEngineClient
from serve_apps.replica.metrics import ReplicaMetrics
from serve_apps.replica.requests import ReplicaRequests
from tests.engine.harness import make_engine
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.channel.plane import NODE
from tests.serve_apps.gateway.scripted import gateway_app
from tests.serve_apps.gateway.test_engines import _no_waiting
from tests.serve_apps.gateway.test_gateway import events_of

__all__ = ["_no_waiting"]  # a fixture, for this module too


class Dying:
    """A replica's connection. After `num_steps` steps nothing more is sent."""

    def __init__(self, to: Connection, num_steps: int | None) -> None:
        self._to, self._left = to, num_steps
        self._loop = asyncio.get_running_loop()
        self.died = asyncio.Event()

    def send(self, outputs: Sequence[tuple[int, TokenOutput]]) -> None:
        if self._left == 0:
            self._loop.call_soon_threadsafe(self.died.set)
            return
        if self._left is not None:
            self._left -= 1
        self._to.send(outputs)

    def watch(self, stream: int, left: Callable[[str], None]) -> None:
        self._to.watch(stream, left)

    def unwatch(self, stream: int) -> None:
        self._to.unwatch(stream)


class Call:
    """Stands in for DeploymentResponseGenerator, and for `EngineReplica.generate_to`."""

    def __init__(self, run: Callable[[Dying], Any], gateway: ChannelAddress, num_steps: int | None) -> None:
        self._run, self._gateway, self._num_steps = run, gateway, num_steps
        self._replica_result_future = asyncio.get_running_loop().create_future()
        self._answer = self._answered()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._answer

    async def _fetch_future_result_async(self) -> None:
        pass

    def cancel(self) -> None:
        pass

    async def _answered(self) -> AsyncIterator[str]:
        to = await connect(self._gateway, NODE, "replica#0")
        outlet = Dying(to, self._num_steps)
        tasks = [asyncio.ensure_future(self._run(outlet)), asyncio.create_task(outlet.died.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if outlet.died.is_set():
                raise ActorDiedError()
            tasks[0].result()
            yield to.name
        finally:
            for task in tasks:
                task.cancel()
            to.close()
            await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Replicas:
    """Stands in for Serve's handle. A request's first replica dies after `dies_after` steps, if that is not None."""

    requests: ReplicaRequests
    dies_after: int | None = None
    asked: list[GenerateRequest] = field(default_factory=list)

    @property
    def generate_to(self) -> Replicas:
        return self

    def options(self, **_: object) -> Replicas:
        return self

    def remote(self, request: GenerateRequest, fit: bool, gateway: ChannelAddress, stream: int) -> Call:
        self.asked.append(request)
        dies_after = None if request.output_ids else self.dies_after
        return Call(lambda outlet: self.requests.run(request, fit, outlet, stream), gateway, dies_after)


class Engines(ServeEngineClient):
    @asynccontextmanager
    async def running(self, late: Callable[[float], None]) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self.close()


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base(max_position_embeddings=4096)


@pytest.fixture(scope="module")
def replicas(base: BaseModel) -> Iterator[Replicas]:
    stream = AsyncEngine(make_engine(base, num_threads=1, enable_prefix_caching=False, pool_bytes=16 << 20))
    stream.start()
    yield Replicas(ReplicaRequests(stream, ReplicaMetrics()))
    stream.stop()


@pytest.fixture(scope="module")
def client(base: BaseModel, replicas: Replicas, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    engines = Engines(cast(Any, replicas), "engine-tiny", NODE, "127.0.0.1")
    with TestClient(gateway_app(base, sqlite_catalog(tmp_path_factory.mktemp("catalog")), engines)) as client:
        yield client


CHAT = [{"role": "user", "content": "1 + 2?"}]
NUMBER = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": NUMBER, "strict": True}}
COMPLETION, CHATS = "/v1/completions", "/v1/chat/completions"
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETION, {"prompt": "abc", "max_tokens": 16, "temperature": 0, "logprobs": 2, "echo": True}),
    "seeded": (COMPLETION, {"prompt": ["a", "b c"], "max_tokens": 16, "seed": 5, "n": 2, "presence_penalty": 0.6}),
    "stopped": (COMPLETION, {"prompt": "abc", "max_tokens": 400, "seed": 2, "stop": ["e", "\u0002"], "min_tokens": 9}),
    "scored": (CHATS, {"messages": CHAT, "max_tokens": 14, "seed": 1, "logprobs": True, "top_logprobs": 2}),
    "json": (
        CHATS,
        {
            "messages": CHAT,
            "seed": 3,
            "max_tokens": 200,
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER, "strict": True}},
        },
    ),
    "tools": (CHATS, {"messages": CHAT, "seed": 4, "max_tokens": 300, "tools": [TOOL], "tool_choice": "required"}),
}


def joined(events: Sequence[Any]) -> dict[Any, Any]:
    """What a stream says, whatever its events are: a text or list for each place, joined, or the last other value."""
    found: dict[Any, Any] = {}

    def add(place: tuple[Any, ...], value: Any) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                add((*place, key), part)
        elif isinstance(value, list) and value and isinstance(value[0], dict) and "index" in value[0]:
            for part in value:
                add((*place, part["index"]), part)
        elif isinstance(value, str | list) and place[-1] not in ("role", "finish_reason", "object", "model", "type"):
            found[place] = found.get(place, type(value)()) + value
        elif value is not None:
            found[place] = value

    assert events[-1] == "[DONE]"
    for event in events[:-1]:
        add((), {key: event[key] for key in ("choices", "usage") if key in event})
    return {place: value for place, value in found.items() if place[-1] != "id"}


def whole(body: dict[str, Any]) -> dict[str, Any]:
    for choice in body["choices"]:
        for call in choice.get("message", {}).get("tool_calls") or ():
            del call["id"]
    return {key: body[key] for key in ("choices", "usage")}


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_answer_is_the_undisturbed_one(
    client: TestClient, replicas: Replicas, base: BaseModel, kind: str, stream: bool
) -> None:
    path, fields = ASKED[kind]
    body = {"model": base.name, **fields}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}

    def ask(dies_after: int | None) -> tuple[dict[Any, Any], list[GenerateRequest]]:
        replicas.dies_after, replicas.asked = dies_after, []
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        return joined(events_of(response)) if stream else whole(response.json()), replicas.asked

    undisturbed, asked = ask(None)
    for dies_after in (1, 2, 6):
        answer, asked_again = ask(dies_after)
        assert answer == undisturbed
        so_far = [len(r.output_ids) for r in asked_again if r.output_ids]
        assert all(n >= dies_after for n in so_far)
        assert len(so_far) == len(asked) or dies_after == 6  # what a schema forces comes in fewer steps
