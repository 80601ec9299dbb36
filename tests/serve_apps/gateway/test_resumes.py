"""Streams whose replica dies or leaves, on a stand-in for Serve's handle: another one goes on with them."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from loray.errors import EngineError, Overloaded, ReplicaUnavailable
from loray.spec import GenerateRequest, TokenDelta, TokenLogprobs
from serve_apps.channel.frames import ChannelAddress, pack
from serve_apps.gateway.replicas import router
from serve_apps.gateway.replicas.engines import ATTEMPTS, DrainingReplicas
from tests.serve_apps.channel.plane import Out
from tests.serve_apps.gateway.test_engines import REQUEST, Handle, Response, _no_waiting, engines_of, raised_by, tokens

__all__ = ["_no_waiting"]  # a fixture, for this module too

IDS = (5, 6, 7, 8)


def out(position: int) -> Out:
    """What any replica generates there."""
    score = TokenLogprobs(-float(position), ((position, -0.5),), 1)
    return Out(IDS[position], "length" if position == len(IDS) - 1 else None, num_cached_tokens=3, logprobs=score)


class Replicas(Handle):
    """Replicas that generate IDS, after those of the given scripts. Each request comes to another one."""

    def remote(self, request: GenerateRequest, fit: bool, gateway: ChannelAddress, stream: int) -> Response:
        if not self.scripts:
            self.scripts.append([out(i) for i in range(len(request.output_ids), len(IDS))])
        router._placed[request.request_id] = f"r{len(self.requests)}"
        return super().remote(request, fit, gateway, stream)


@pytest.fixture(autouse=True)
def _placed() -> Iterator[None]:
    yield
    router._placed.clear()


def run(handle: Handle, **spec: Any) -> tuple[list[TokenDelta], dict[str, int]]:
    async def collect() -> tuple[list[TokenDelta], dict[str, int]]:
        async with engines_of(handle, **spec) as engines:
            return [d async for d in engines.generate(REQUEST, fit=True)], dict(engines.resumes())

    return asyncio.run(collect())


def test_whatever_byte_was_the_last_the_answer_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first replica dies in its second or third frame, or between them."""
    frames = [pack([(1, out(i))]) for i in range(3)]
    numbers = itertools.cycle((1, 2))  # of streams: the first attempt's, and the second's
    monkeypatch.setattr(secrets, "randbits", lambda bits: next(numbers))
    first, rest = frames[0], b"".join(frames[1:])
    for cut in range(len(rest) + 1):
        handle = Replicas([first + rest[:cut], ActorDiedError()])
        deltas, resumes = run(handle)
        assert tuple(t for d in deltas for t in d.token_ids) == IDS
        scores = [lp for d in deltas for lp in d.logprobs or ()]
        assert [lp.logprob for lp in scores] == [-float(i) for i in range(len(IDS))]
        assert [d.finish_reason for d in deltas if d.finish_reason is not None] == ["length"]
        _, again = handle.requests
        num_whole = 1 + (cut >= len(frames[1])) + (cut == len(rest))
        assert again == replace(REQUEST, request_id="r-1", output_ids=IDS[:num_whole])
        assert resumes == {"lost": 1, "moved": 0}


def test_the_prompts_cached_tokens_are_those_of_the_first_replica() -> None:
    deltas, _ = run(Replicas([Out(5, num_cached_tokens=1), ActorDiedError()]))
    assert {d.num_cached_tokens for d in deltas} == {1}


@pytest.mark.parametrize("max_resumes", [0, 1, 2])
def test_so_many_replicas_may_be_lost(max_resumes: int) -> None:
    dies = [[out(i), ActorDiedError()] for i in range(3)]
    for num_deaths in range(4):
        handle = Replicas(*dies[:num_deaths])
        if num_deaths <= max_resumes:
            assert tuple(t for d in run(handle, max_resumes=max_resumes)[0] for t in d.token_ids) == IDS
        else:
            with pytest.raises(EngineError, match="lost; send it again"):
                run(handle, max_resumes=max_resumes)
        assert len(handle.requests) == min(num_deaths, max_resumes) + 1


def test_a_request_that_kills_replicas_at_one_token_kills_no_third() -> None:
    handle = Replicas([out(0), ActorDiedError()], [ActorDiedError()])
    with pytest.raises(EngineError, match="lost; send it again"):
        run(handle)
    assert [r.output_ids for r in handle.requests] == [(), IDS[:1]]


def test_a_router_that_does_not_know_yet_costs_no_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attempt comes to the dead replica again, or to one whose engine has stopped."""
    monkeypatch.setattr(router, "replica_of", lambda request_id: "dead")
    stopped = raised_by(ReplicaUnavailable("the engine has stopped", "another"))
    handle = Replicas([out(0), ActorDiedError()], [ActorDiedError()], [stopped])
    assert tuple(t for d in run(handle)[0] for t in d.token_ids) == IDS
    handle = Replicas([out(0), ActorDiedError()], *[[ActorDiedError()]] * ATTEMPTS)
    with pytest.raises(EngineError, match="lost; send it again"):
        run(handle)
    assert not handle.scripts


def test_what_another_replica_refuses_ends_the_stream() -> None:
    with pytest.raises(Overloaded, match="full"):
        run(Replicas([out(0), ActorDiedError()], [raised_by(Overloaded("full", 3.0))]))


@pytest.mark.parametrize("begun", [True, False])
def test_a_replica_that_leaves_hands_its_streams_over(monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    """After the grace, once there is another one. What has not begun is sent again as it was."""
    handle = Replicas([*([out(0)] if begun else []), "hang"])

    async def test() -> None:
        async with engines_of(handle, max_resumes=0, drain_grace_s=10) as engines:
            collecting = asyncio.create_task(tokens(engines))
            while not handle.responses or handle.responses[0]._to is None or len(handle.responses[0].script) > 0:
                await asyncio.sleep(0)
            while begun and not engines._listener.result()._sources:  # type: ignore[union-attr]
                await asyncio.sleep(0)
            for at, running in ((0, {"r0", "r1"}), (1, {"r1"}), (10.9, {"r1"}), (20, set())):
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

    asyncio.run(test())
    assert [r.output_ids for r in handle.requests] == [(), IDS[:1] if begun else ()]


def test_a_reader_that_leaves_meanwhile_leaves_nothing() -> None:
    handle = Replicas([out(0), ActorDiedError()], ["hang"])

    async def test() -> None:
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

    asyncio.run(test())


def test_departures() -> None:
    leaving = DrainingReplicas(grace_s=5)
    assert leaving.due(["a", "b", None], {"a", "b"}, now=0) == frozenset()
    assert leaving.due(["a", "b"], {"b"}, now=1) == frozenset()
    assert leaving.due(["a", "b"], {"a", "b"}, now=2) == frozenset()  # it is back
    assert leaving.due(["a", "b"], {"b"}, now=3) == frozenset()
    assert leaving.due(["a", "b"], {"b"}, now=7.9) == frozenset()
    assert leaving.due(["a", "b"], {"b"}, now=8) == {"a"}
    assert leaving.due(["b"], {"b"}, now=9) == frozenset()
    assert leaving.due(["b"], set(), now=99) == frozenset()
