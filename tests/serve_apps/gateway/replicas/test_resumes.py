"""Streams whose replica dies or leaves: another one goes on with them, and the client gets the undisturbed answer."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient
from ray.exceptions import ActorDiedError

from loray.bases.registry import BaseModel
from loray.engine.async_engine import AsyncEngine
from loray.errors import EngineError, Overloaded, ReplicaUnavailable
from loray.spec import GenerateRequest, SamplingParams, ServeSpec, TokenDelta, TokenLogprobs
from serve_apps.channel.frames import ChannelAddress, pack
from serve_apps.gateway.replicas import router
from serve_apps.gateway.replicas.engines import ATTEMPTS, ServeEngineClient
from serve_apps.replica.metrics import ReplicaMetrics
from serve_apps.replica.requests import MOST_HELD, ReplicaRequests
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.channel import NODE, Out
from tests.fixtures.engines import make_engine
from tests.fixtures.gateway import events_of, gateway_app
from tests.fixtures.handles import REQUEST, Beside, Handle, LiveHandle, engines_of, raised_by, tokens

IDS = (5, 6, 7, 8)


def out(position: int) -> Out:
    """What any replica generates there."""
    score = TokenLogprobs(-float(position), ((position, -0.5),), 1)
    return Out(IDS[position], "length" if position == len(IDS) - 1 else None, num_cached_tokens=3, logprobs=score)


class Scripted(Handle):
    """Replicas that generate IDS, after those of the given scripts. Each request comes to another one."""

    def remote(
        self, request: GenerateRequest, fit: bool, gateway: ChannelAddress, stream: int, others: Sequence[Beside]
    ) -> Any:
        if not self.scripts:
            self.scripts.append([out(i) for i in range(len(request.output_ids), len(IDS))])
        router.own.accepted(request.request_id, f"r{len(self.requests)}")
        return super().remote(request, fit, gateway, stream, others)


async def resumed(handle: Handle, **spec: Any) -> tuple[list[TokenDelta], dict[str, int]]:
    async with engines_of(handle, **spec) as engines:
        return [d async for d in engines.generate(REQUEST, fit=True)], dict(engines.resumes())


async def ids(handle: Handle, **spec: Any) -> tuple[int, ...]:
    return tuple(t for d in (await resumed(handle, **spec))[0] for t in d.token_ids)


async def test_whatever_byte_was_the_last_the_answer_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first replica dies in its second or third frame, or between them."""
    frames = [pack([(1, out(i))]) for i in range(3)]
    numbers = itertools.cycle((1, 2))  # of streams: the first attempt's, and the second's
    monkeypatch.setattr(secrets, "randbits", lambda bits: next(numbers))
    first, rest = frames[0], b"".join(frames[1:])
    for cut in range(len(rest) + 1):
        handle = Scripted([first + rest[:cut], ActorDiedError()])
        deltas, resumes = await resumed(handle)
        assert tuple(t for d in deltas for t in d.token_ids) == IDS
        scores = [lp for d in deltas for lp in d.logprobs or ()]
        assert [lp.logprob for lp in scores] == [-float(i) for i in range(len(IDS))]
        assert [d.finish_reason for d in deltas if d.finish_reason is not None] == ["length"]
        _, again = handle.requests
        num_whole = 1 + (cut >= len(frames[1])) + (cut == len(rest))
        assert again == replace(REQUEST, request_id="r-1", output_ids=IDS[:num_whole])
        assert resumes == {"lost": 1, "moved": 0}


async def test_the_prompts_cached_tokens_are_those_of_the_first_replica() -> None:
    deltas, _ = await resumed(Scripted([Out(5, num_cached_tokens=1), ActorDiedError()]))
    assert {d.num_cached_tokens for d in deltas} == {1}


@pytest.mark.parametrize("max_resumes", [0, 1, 2])
async def test_so_many_replicas_may_be_lost(max_resumes: int) -> None:
    dies = [[out(i), ActorDiedError()] for i in range(3)]
    for num_deaths in range(4):
        handle = Scripted(*dies[:num_deaths])
        if num_deaths <= max_resumes:
            assert await ids(handle, max_resumes=max_resumes) == IDS
        else:
            with pytest.raises(EngineError, match="lost; send it again"):
                await resumed(handle, max_resumes=max_resumes)
        assert len(handle.requests) == min(num_deaths, max_resumes) + 1


async def test_a_request_that_kills_replicas_at_one_token_kills_no_third() -> None:
    handle = Scripted([out(0), ActorDiedError()], [ActorDiedError()])
    with pytest.raises(EngineError, match="lost; send it again"):
        await resumed(handle)
    assert [r.output_ids for r in handle.requests] == [(), IDS[:1]]


async def test_a_router_that_does_not_know_yet_costs_no_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attempt comes to the dead replica again, or to one whose engine has stopped."""
    monkeypatch.setattr(router.own, "replica_of", lambda request_id: "dead")
    stopped = raised_by(ReplicaUnavailable("the engine has stopped", "another"))
    handle = Scripted([out(0), ActorDiedError()], [ActorDiedError()], [stopped])
    assert await ids(handle) == IDS
    handle = Scripted([out(0), ActorDiedError()], *[[ActorDiedError()]] * ATTEMPTS)
    with pytest.raises(EngineError, match="lost; send it again"):
        await resumed(handle)
    assert not handle.scripts


async def test_what_another_replica_refuses_ends_the_stream() -> None:
    with pytest.raises(Overloaded, match="full"):
        await resumed(Scripted([out(0), ActorDiedError()], [raised_by(Overloaded("full", 3.0))]))


@pytest.mark.parametrize("begun", [True, False])
async def test_a_replica_that_leaves_hands_its_streams_over(monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    """After the grace, once there is another one. What has not begun is sent again as it was."""
    handle, both = Scripted([*([out(0)] if begun else []), "hang"]), {"r0", "r1"}
    async with engines_of(handle, max_resumes=0, drain_grace_s=10) as engines:
        collecting = asyncio.create_task(tokens(engines))
        while not handle.responses or handle.responses[0]._to is None or len(handle.responses[0].script) > 0:
            await asyncio.sleep(0)
        while begun and not engines._listener.result()._sources:  # type: ignore[union-attr]
            await asyncio.sleep(0)
        moments: list[tuple[float, set[str]]] = [
            (0, both),
            (1, {"r1"}),
            (2, both),
            (3, {"r1"}),
            (12.9, {"r1"}),
            (20, set()),
        ]
        for at, running in moments:
            monkeypatch.setattr(router, "_replicas", {"engine-tiny": frozenset(running)})
            engines._move_streams(at)
            await asyncio.sleep(0)
            assert len(handle.requests) == 1
        monkeypatch.setattr(router, "_replicas", {"engine-tiny": frozenset({"r1"})})
        engines._move_streams(20)
        assert tuple(await collecting) == IDS
        (first, _) = handle.responses
        while begun and not first.left:
            await asyncio.sleep(0)
        assert (first.left, first.cancelled) == ((["abort"], False) if begun else ([], True))
        assert engines.resumes() == {"lost": 0, "moved": int(begun)}
    assert [r.output_ids for r in handle.requests] == [(), IDS[:1] if begun else ()]


async def test_a_reader_that_leaves_meanwhile_leaves_nothing() -> None:
    handle = Scripted([out(0), ActorDiedError()], ["hang"])
    async with engines_of(handle) as engines:
        async with aclosing(engines.generate(REQUEST, fit=True)) as deltas:
            await anext(deltas)
            waiting = asyncio.create_task(anext(deltas))
            while len(handle.responses) < 2 or handle.responses[1]._to is None:
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
        assert engines._reading == {}
        assert handle.responses[1].cancelled


@pytest.fixture(scope="module")
def base(thinking_base: Callable[[str], BaseModel]) -> BaseModel:
    return thinking_base("qwen3")


@pytest.fixture(scope="module")
def live(base: BaseModel) -> Iterator[LiveHandle]:
    stream = AsyncEngine(make_engine(base, num_threads=1, enable_prefix_caching=False, pool_bytes=16 << 20))
    stream.start()
    yield LiveHandle(ReplicaRequests(stream, ReplicaMetrics()))
    stream.stop()


@pytest.fixture(scope="module")
def client(base: BaseModel, live: LiveHandle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    engines = Closed(cast(Any, live), ServeSpec(base=base.name), NODE, "127.0.0.1")
    with TestClient(gateway_app(base, sqlite_catalog(tmp_path_factory.mktemp("catalog")), engines)) as client:
        yield client


class Closed(ServeEngineClient):
    """Where its application ends."""

    @asynccontextmanager
    async def running(self, late: Callable[[float], None]) -> AsyncIterator[None]:
        async with super().running(late):
            yield
        await self.close()


@pytest.mark.parametrize(("dies_after", "num_left"), [(1, 1), (2, 1 + MOST_HELD + 1)])
async def test_an_answer_that_nobody_reads_along_loses_what_was_held(
    live: LiveHandle, dies_after: int, num_left: int
) -> None:
    """And another replica computes it again, to the same bits."""
    params = SamplingParams(max_tokens=60, seed=1, logprobs=0, ignore_eos=True)
    asked = GenerateRequest("r", (1, 2, 3), params, output_kind="final")

    undisturbed = await sampled(live, None, asked)
    assert await sampled(live, dies_after, asked) == undisturbed
    assert [len(r.output_ids) for r in live.requests] == [0, num_left]


async def sampled(live: LiveHandle, dies_after: int | None, *asked: GenerateRequest) -> list[TokenDelta]:
    """Each answer as one delta."""
    live.dies_after, live.requests, live.num_together = dies_after, [], []

    async def answer(engines: ServeEngineClient, request: GenerateRequest) -> TokenDelta:
        deltas = [delta async for delta in engines.generate(request, fit=False)]
        scores = tuple(lp for d in deltas for lp in d.logprobs or ())
        return TokenDelta(tuple(t for d in deltas for t in d.token_ids), deltas[-1].finish_reason, 0, scores)

    async with engines_of(live) as engines:
        return await asyncio.gather(*(answer(engines, request) for request in asked))


def group(num_samples: int, prompt: tuple[int, ...] = (1, 2, 3)) -> list[GenerateRequest]:
    params = [SamplingParams(max_tokens=40, seed=i, logprobs=0, ignore_eos=True) for i in range(num_samples)]
    return [GenerateRequest(f"s{i}", prompt, own, output_kind="final") for i, own in enumerate(params)]


async def test_samples_of_one_prompt_are_one_call(live: LiveHandle) -> None:
    """Up to eight. An equal prompt is another trainer's call, whose errors are its own; and streams of people have
    calls of their own. The answers are the same.
    """
    asked = group(10)
    answers = await sampled(live, None, *asked)
    assert live.num_together == [8, 2]
    another = replace(asked[1], prompt_ids=(*asked[1].prompt_ids,))
    assert await sampled(live, None, asked[0], another, replace(asked[2], output_kind="delta")) == answers[:3]
    assert live.num_together == [1, 1, 1]


@pytest.mark.parametrize("dies_after", [1, 2])
async def test_each_of_a_call_whose_replica_dies_goes_on(
    live: LiveHandle, monkeypatch: pytest.MonkeyPatch, dies_after: int
) -> None:
    monkeypatch.setattr(live, "dies_once", True)
    asked = group(5)
    undisturbed = await sampled(live, None, *asked)
    assert len({answer.token_ids for answer in undisturbed}) == 5
    assert await sampled(live, dies_after, *asked) == undisturbed
    assert live.num_together[0] == 5
    so_far = {len(r.output_ids) for r in live.requests[5:]}
    assert {0} < so_far | {0} <= {0, 1, 1 + MOST_HELD + 1}


@pytest.mark.parametrize("begun", [False, True])
async def test_a_caller_that_leaves_ends_all_of_its_call(begun: bool) -> None:
    """Over the connection those of which tokens came; else the call is cancelled."""
    handle = Scripted([*([Out(5)] if begun else []), "hang"])
    async with engines_of(handle) as engines:
        asked = [replace(REQUEST, request_id=f"s{i}", output_kind="final") for i in range(3)]
        readers = [asyncio.create_task(tokens(engines, request, fit=False)) for request in asked]
        while not handle.responses or handle.responses[0]._to is None or len(handle.responses[0].script) > 0:
            await asyncio.sleep(0)
        while begun and not engines._listener.result()._sources:  # type: ignore[union-attr]
            await asyncio.sleep(0)
        for reader in readers[1:]:
            reader.cancel()
        await asyncio.wait(readers[1:])
        (response,) = handle.responses
        assert not response.cancelled
        readers[0].cancel()
        await asyncio.wait(readers)
        assert response.cancelled
        while begun and not response.left:
            await asyncio.sleep(0)
        assert engines._reading == {}


CHAT = [{"role": "user", "content": "1 + 2?"}]
NUMBER = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
STRICT = {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER, "strict": True}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": NUMBER, "strict": True}}
BEGUN = {"role": "assistant", "content": "<think>\nso far"}
THINKING: dict[str, Any] = {"messages": [*CHAT, BEGUN], "continue_final_message": True, "thinking_token_budget": 8}
THINKING["seed"] = 6
COMPLETION, CHATS = "/v1/completions", "/v1/chat/completions"
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETION, {"prompt": "abc", "max_tokens": 16, "temperature": 0, "logprobs": 2, "echo": True}),
    "seeded": (COMPLETION, {"prompt": ["a", "b c"], "max_tokens": 16, "seed": 5, "n": 2, "presence_penalty": 0.6}),
    "stopped": (COMPLETION, {"prompt": "abc", "max_tokens": 400, "seed": 2, "stop": ["e", "\u0002"], "min_tokens": 9}),
    "scored": (CHATS, {"messages": CHAT, "max_tokens": 14, "seed": 1, "logprobs": True, "top_logprobs": 2}),
    "json": (CHATS, {"messages": CHAT, "seed": 3, "max_tokens": 200, "response_format": STRICT}),
    "tools": (CHATS, {"messages": CHAT, "seed": 4, "max_tokens": 300, "tools": [TOOL], "tool_choice": "required"}),
    "a thought": (CHATS, THINKING | {"max_tokens": 12, "n": 2, "logprobs": True}),
    "a thought before a schema": (CHATS, THINKING | {"max_tokens": 200, "response_format": STRICT}),
    "a thought before a call": (CHATS, THINKING | {"max_tokens": 300, "tools": [TOOL], "tool_choice": "required"}),
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
    client: TestClient, live: LiveHandle, base: BaseModel, kind: str, stream: bool
) -> None:
    path, fields = ASKED[kind]
    body = {"model": base.name, **fields}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}

    def ask(dies_after: int | None) -> tuple[dict[Any, Any], list[GenerateRequest]]:
        live.dies_after, live.requests = dies_after, []
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        return joined(events_of(response)) if stream else whole(response.json()), live.requests

    undisturbed, asked = ask(None)
    for dies_after in (1, 2, 6):
        answer, asked_again = ask(dies_after)
        assert answer == undisturbed
        so_far = [len(r.output_ids) for r in asked_again if r.output_ids]
        assert all(n >= dies_after for n in so_far)
        assert len(so_far) == len(asked) or dies_after == 6  # what a schema forces comes in fewer steps
