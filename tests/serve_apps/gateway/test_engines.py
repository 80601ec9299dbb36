"""The gateway's use of a Serve handle, on a stand-in: retries, translated errors, cancellation."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from loray.errors import (
    AdapterQuarantined,
    ContextLengthExceeded,
    EngineError,
    LorayError,
    Overloaded,
    ReplicaUnavailable,
    RequestError,
)
from loray.spec import AdapterRef, GenerateRequest, SamplingParams
from serve_apps.channel import listener
from serve_apps.channel.connection import Connection, connect
from serve_apps.channel.frames import ChannelAddress
from serve_apps.gateway.errors import failure_of
from serve_apps.gateway.replicas import engines as call
from serve_apps.gateway.replicas import engines as generation
from serve_apps.gateway.replicas import router
from serve_apps.gateway.replicas.engines import ATTEMPTS, ServeEngineClient
from tests.serve_apps.channel.plane import NODE, Out

REQUEST = GenerateRequest("r", (1, 2), SamplingParams())


LAST = Out(2, "stop")


class Response:
    """Stands in for DeploymentResponseGenerator, and for the replica of its call, which sends over the channel."""

    def __init__(self, script: list[Any], gateway: ChannelAddress, stream: int) -> None:
        self.script, self.cancelled = list(script), False
        self._replica_result_future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.left: list[str] = []
        self._gateway, self._stream = gateway, stream
        self._to: Connection | None = None

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def _fetch_future_result_async(self) -> None:
        if self.script and self.script[0] == "wait":
            await asyncio.Event().wait()

    async def __anext__(self) -> str:
        if self._to is None:
            self._to = await connect(self._gateway, NODE, "replica#0")
            self._to.watch(self._stream, self.left.append)
        while self.script:
            item = self.script.pop(0)
            if item == "hang":
                await asyncio.Event().wait()
            if isinstance(item, Exception):
                raise item
            if item == "return":
                return self._to.name
            if item == "break":
                self._to.close()
            elif isinstance(item, bytes):
                self._to._writer.write(item)
            else:
                self._to.send([(self._stream, item)])
            for _ in range(5):  # until the gateway has read it
                await asyncio.sleep(0)
        if self._to.is_open:
            self._to.close()
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts, self.responses, self.requests = list(scripts), list[Response](), list[GenerateRequest]()
        self.generate_to = self

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, request: GenerateRequest, fit: bool, gateway: ChannelAddress, stream: int) -> Response:
        self.requests.append(request)
        self.responses.append(Response(self.scripts.pop(0), gateway, stream))
        return self.responses[-1]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_BACKOFF_S", 0.0)
    monkeypatch.setattr(listener, "_LOST_S", 0.01)


@asynccontextmanager
async def engines_of(handle: Any, **spec: Any) -> AsyncIterator[ServeEngineClient]:
    """At the end nothing is left of them: no connection, stream or task."""
    engines = ServeEngineClient(handle, "engine-tiny", NODE, "127.0.0.1", **spec)
    try:
        yield engines
    finally:
        await engines.close()
        for response in getattr(handle, "responses", ()):
            if response._to is not None and response._to.is_open:
                response._to.close()
        for _ in range(5):
            await asyncio.sleep(0)
    if engines._listener is not None:
        found = engines._listener.result()
        assert [*found._all, *found._peers, *found._inboxes, *found._sources] == []


async def tokens(engines: ServeEngineClient, request: GenerateRequest = REQUEST) -> list[int]:
    return [t async for d in engines.generate(request, fit=True) for t in d.token_ids]


def collect(handle: Handle) -> list[int]:
    async def run() -> list[int]:
        async with engines_of(handle) as engines:
            return await tokens(engines)

    return asyncio.run(run())


def raised_by(error: Exception) -> Exception:
    """An error of a replica, as Ray raises it in the gateway."""
    wrapped = RayTaskError("generate", "traceback", error)
    return wrapped.as_instanceof_cause()  # type: ignore[no-any-return]


def test_a_request_of_a_lost_replica_is_retried_before_its_first_token() -> None:
    handle = Handle([ActorDiedError()], [raised_by(ReplicaUnavailable("stopped"))], [Out(1), LAST, "return"])
    assert collect(handle) == [1, 2]
    assert [r.request_id for r in handle.requests] == ["r", "r-1", "r-2"]


def test_a_replica_whose_engine_has_stopped_is_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    avoided: list[str] = []
    monkeypatch.setattr(router, "suspect", avoided.append)
    error = pickle.loads(pickle.dumps(ReplicaUnavailable("stopped", "r7")))  # as it comes from the replica's process
    assert collect(Handle([raised_by(error)], [LAST])) == [2]
    assert avoided == ["r7"]


def test_attempts_are_bounded() -> None:
    handle = Handle(*[[ActorDiedError()]] * ATTEMPTS)
    with pytest.raises(EngineError, match="lost; send it again"):
        collect(handle)
    assert not handle.scripts


def test_an_adapter_that_kills_a_replica_is_not_sent_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = "d" * 64
    ref = AdapterRef(
        digest=digest, name="a", version=1, method="lora", base_fingerprint="0" * 64, context_length=9, nbytes=1
    )
    monkeypatch.setattr(router, "replica_of", {"r": "replica#0", "s": "replica#1"}.get)
    handle = Handle([ActorDiedError()], [LAST], [LAST])

    async def run() -> list[int]:
        async with engines_of(handle) as engines:
            engines._quarantine._clock = lambda: 1e9  # stands still
            for name in ("r", "s"):
                with pytest.raises(AdapterQuarantined, match="is refused for 60 s") as e:
                    await tokens(engines, replace(REQUEST, request_id=name, adapter=ref))
                assert failure_of(e.value).headers == {"Retry-After": "60", "Retry-After-Ms": "60000"}
            return await tokens(engines, replace(REQUEST, adapter=replace(ref, digest="e" * 64)))

    assert asyncio.run(run()) == [2]
    assert [r.request_id for r in handle.requests] == ["r", "r"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (raised_by(RequestError("bad", "prompt")), RequestError),
        (raised_by(Overloaded("full", 3.0)), Overloaded),
        (raised_by(ZeroDivisionError("x")), ZeroDivisionError),
        (BackPressureError(5, 5), Overloaded),
    ],
)
def test_errors_have_the_class_that_the_replica_raised(error: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected) as e:
        collect(Handle([error]))
    assert not isinstance(e.value, RayTaskError)
    if isinstance(e.value, RequestError):
        assert (e.value.param, str(e.value)) == ("prompt", "bad")
    if isinstance(e.value, LorayError):
        assert isinstance(e.value, expected)


@pytest.mark.parametrize("error", [EngineError("the engine stopped"), ContextLengthExceeded("too long", "prompt")])
def test_errors_of_an_engine_are_not_retried(error: Exception) -> None:
    handle = Handle([raised_by(error)])
    with pytest.raises(type(error)):
        collect(handle)
    assert handle.responses[0].cancelled  # Serve keeps a call that has not been read to its end
    assert len(handle.requests) == 1


def test_a_stream_ends_with_its_last_token_whatever_its_call_does() -> None:
    assert collect(Handle([Out(1), LAST, "hang"])) == [1, 2]
    assert collect(Handle([Out(1), LAST, ActorDiedError()])) == [1, 2]


def test_tokens_that_come_after_the_call_has_returned_are_waited_for() -> None:
    async def run() -> list[int]:
        handle = Handle([Out(1), "return", "hang"])
        async with engines_of(handle) as engines, aclosing(engines.generate(REQUEST, fit=True)) as deltas:
            first = await anext(deltas)
            (response,) = handle.responses
            rest = asyncio.create_task(anext(deltas))
            await asyncio.sleep(0.01)
            assert not rest.done()
            assert response._to is not None
            response._to.send([(response._stream, LAST)])
            return [*first.token_ids, *(await rest).token_ids]

    assert asyncio.run(run()) == [1, 2]


@pytest.mark.parametrize("script", [[Out(1), "break", "hang"], [Out(1), "break", "return"]])
def test_a_connection_that_breaks_in_a_stream_is_a_lost_replica(script: list[Any]) -> None:
    async def run() -> None:
        async with engines_of(handle, max_resumes=0) as engines:
            with pytest.raises(ReplicaUnavailable, match="lost; send it again"):
                await tokens(engines)

    handle = Handle(script)
    asyncio.run(run())
    assert len(handle.requests) == 1


def test_a_call_that_returns_and_sends_nothing_is_sent_again() -> None:
    assert collect(Handle(["break", "return"], [LAST])) == [2]


@pytest.mark.parametrize("stop", [("x",), ()])
def test_closing_ends_the_request_over_the_connection(stop: tuple[str, ...]) -> None:
    async def run() -> tuple[list[str], bool]:
        handle = Handle([Out(1), "hang"])
        async with engines_of(handle) as engines:
            request = GenerateRequest("r", (1, 2), SamplingParams(stop=stop))
            async with aclosing(engines.generate(request, fit=False)) as deltas:
                await anext(deltas)
            (response,) = handle.responses
            while not response.left:
                await asyncio.sleep(0)
            return response.left, response.cancelled

    assert asyncio.run(run()) == (["stop" if stop else "abort"], False)


@pytest.mark.parametrize("script", [["hang"], ["wait"]])
def test_a_task_that_is_cancelled_before_the_first_token_cancels_the_call(script: list[Any]) -> None:
    async def run() -> list[bool]:
        handle = Handle(script)
        async with engines_of(handle) as engines:
            task = asyncio.create_task(tokens(engines))
            while not handle.responses or (script == ["hang"] and handle.responses[0]._to is None):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            return [r.cancelled for r in handle.responses]

    assert asyncio.run(run()) == [True]


@pytest.mark.parametrize("accepted", [False, True])
def test_waiting_for_a_replica_is_bounded(monkeypatch: pytest.MonkeyPatch, accepted: bool) -> None:
    """A request that a replica has accepted is waited for without a limit."""
    monkeypatch.setattr(call, "_NO_REPLICA_S", 0.2)
    handle = Handle(["hang"] if accepted else ["wait"])

    async def run() -> None:
        async with engines_of(handle) as engines:
            await asyncio.wait_for(anext(engines.generate(REQUEST, fit=True)), 0.6 if accepted else 20)

    with pytest.raises(TimeoutError if accepted else EngineError):
        asyncio.run(run())
    assert [r.cancelled for r in handle.responses] == [True]
