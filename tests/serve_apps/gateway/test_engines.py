"""The gateway's use of a Serve handle, on a stand-in: retries, translated errors, cancellation."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from loray.api.status import ReplicaStatus
from loray.errors import ContextLengthExceeded, EngineError, LorayError, Overloaded, ReplicaUnavailable, RequestError
from loray.spec import GenerateRequest, SamplingParams, TokenDelta
from serve_apps.gateway.replicas import engines as generation
from serve_apps.gateway.replicas import router
from serve_apps.gateway.replicas.engines import ATTEMPTS, ServeEngines
from serve_apps.replica.streams import coalesced, merge_deltas
from tests.serve_apps.gateway.scripted import delta

REQUEST = GenerateRequest("r", (1, 2), SamplingParams())


class Response:
    """Stands in for DeploymentResponseGenerator: an asynchronous iterator that can be cancelled."""

    def __init__(self, script: list[Any]) -> None:
        self.script, self.cancelled = list(script), False

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        return self

    async def _fetch_future_result_async(self) -> None:
        if self.script and self.script[0] == "wait":
            await asyncio.Event().wait()

    async def __anext__(self) -> TokenDelta:
        if not self.script:
            raise StopAsyncIteration
        item = self.script.pop(0)
        if item == "hang":
            await asyncio.Event().wait()
        if isinstance(item, Exception):
            raise item
        return item  # type: ignore[no-any-return]

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts, self.responses, self.requests = list(scripts), list[Response](), list[GenerateRequest]()
        self.generate = self

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, request: GenerateRequest, fit: bool) -> Response:
        self.requests.append(request)
        self.responses.append(Response(self.scripts.pop(0)))
        return self.responses[-1]


class Broadcasts:
    """A handle whose broadcasts return scripted results, or fail."""

    def __init__(self, answers: list[Any] | Exception) -> None:
        self.answers, self.asked = answers, list[str]()

    def options(self, **_: Any) -> Broadcasts:
        return self

    def broadcast(self, method: str) -> Broadcasts:
        self.asked.append(method)
        return self

    async def _fetch_replica_results_async(self) -> list[Any]:
        return self.results(timeout_s=0.0, return_exceptions=True)

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_BACKOFF_S", 0.0)


def collect(handle: Handle) -> list[TokenDelta]:
    async def run() -> list[TokenDelta]:
        return [d async for d in ServeEngines(handle).generate(REQUEST, fit=True)]  # type: ignore[arg-type]

    return asyncio.run(run())


def raised_by(error: Exception) -> Exception:
    """An error of a replica, as Ray raises it in the gateway."""
    wrapped = RayTaskError("generate", "traceback", error)
    return wrapped.as_instanceof_cause()  # type: ignore[no-any-return]


def test_a_request_of_a_lost_replica_is_retried_before_its_first_delta() -> None:
    handle = Handle([ActorDiedError()], [raised_by(ReplicaUnavailable("stopped"))], [delta("a"), delta("b", "stop")])
    assert collect(handle) == [delta("a"), delta("b", "stop")]
    assert [r.request_id for r in handle.requests] == ["r", "r-1", "r-2"]


def test_a_replica_whose_engine_has_stopped_is_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    avoided: list[str] = []
    monkeypatch.setattr(router, "suspect", avoided.append)
    error = pickle.loads(pickle.dumps(ReplicaUnavailable("stopped", "r7")))  # as it comes from the replica's process
    assert collect(Handle([raised_by(error)], [delta("a", "stop")])) == [delta("a", "stop")]
    assert avoided == ["r7"]


def test_attempts_are_bounded() -> None:
    handle = Handle(*[[ActorDiedError()]] * ATTEMPTS)
    with pytest.raises(EngineError, match="lost; send it again"):
        collect(handle)
    assert not handle.scripts


def test_a_request_is_not_retried_after_its_first_delta() -> None:
    handle = Handle([delta("a"), ActorDiedError()], [delta("never")])
    with pytest.raises(EngineError):
        collect(handle)
    assert len(handle.requests) == 1


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
    assert len(handle.requests) == 1


def test_closing_cancels_and_finishing_does_not() -> None:
    async def run() -> tuple[bool, bool]:
        handle = Handle([delta("a"), "hang"], [delta("a", "stop")])
        engines = ServeEngines(handle)  # type: ignore[arg-type]
        async with aclosing(engines.generate(REQUEST, fit=False)) as first:
            await anext(first)
        async for _ in engines.generate(REQUEST, fit=False):
            pass
        return handle.responses[0].cancelled, handle.responses[1].cancelled

    assert asyncio.run(run()) == (True, False)


def test_cancelling_the_task_cancels_every_choice() -> None:
    async def run() -> list[bool]:
        handle = Handle(["hang"], ["hang"], ["hang"])
        engines = ServeEngines(handle)  # type: ignore[arg-type]
        parts = [engines.generate(REQUEST, fit=False) for _ in range(3)]
        task = asyncio.gather(*(anext(part) for part in parts))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        return [r.cancelled for r in handle.responses]

    assert asyncio.run(run()) == [True] * 3


async def _paced(*deltas: TokenDelta) -> AsyncGenerator[TokenDelta, None]:
    for d in deltas:
        yield d


def test_a_slow_reader_gets_fewer_pieces_and_the_same_tokens() -> None:
    deltas = [*map(delta, "abcdef"), delta("!", "stop")]

    async def run() -> list[TokenDelta]:
        out = []
        async for d in coalesced(_paced(*deltas)):
            out.append(d)
            await asyncio.sleep(0.01)
        return out

    out = asyncio.run(run())
    assert len(out) < len(deltas)
    assert [t for d in out for t in d.token_ids] == [t for d in deltas for t in d.token_ids]
    assert out[-1].finish_reason == "stop"


def test_an_error_passes_after_what_came_before_it() -> None:
    async def failing() -> AsyncGenerator[TokenDelta, None]:
        yield delta("a")
        raise EngineError("x")

    async def run() -> list[TokenDelta | str]:
        out: list[TokenDelta | str] = []
        try:
            async for d in coalesced(failing()):
                out.append(d)
        except EngineError:
            out.append("failed")
        return out

    assert asyncio.run(run()) == [delta("a"), "failed"]


def test_merged_deltas_keep_logprobs() -> None:
    one = delta("a")._replace(logprobs=("x",))  # type: ignore[arg-type]
    two = delta("b", "stop")._replace(logprobs=("y", "z"))  # type: ignore[arg-type]
    ids = (*one.token_ids, *two.token_ids)
    assert merge_deltas([one, two]) == TokenDelta(ids, "stop", logprobs=("x", "y", "z"))  # type: ignore[arg-type]


def test_a_silent_replica_does_not_hide_the_others() -> None:
    status = ReplicaStatus(replica="r1", node="n", pid=1, uptime_s=1.0, num_running=1)
    handle: Any = Broadcasts([[], TimeoutError(), status])
    assert asyncio.run(ServeEngines(handle).metrics()) == [[], None, None]
    assert asyncio.run(ServeEngines(handle).stats()) == [status]
    assert handle.asked == ["metrics", "stats"]


class Answer:
    """Stands in for Serve's ReplicaResult."""

    def __init__(self, what: Any) -> None:
        self._what = what

    async def get_async(self) -> Any:
        if self._what == "hang":
            await asyncio.Event().wait()
        if isinstance(self._what, Exception):
            raise self._what
        return self._what


def healthy(*answers: Any) -> bool:
    handle: Any = Broadcasts([Answer(what) for what in answers])
    good = asyncio.run(ServeEngines(handle).healthy())
    assert handle.asked == ["check_health"]
    return good


def test_one_healthy_replica_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_HEALTH_TIMEOUT_S", 60.0)
    assert healthy("hang", EngineError("stopped"), None)  # at once
    assert not healthy(EngineError("stopped"))
    monkeypatch.setattr(generation, "_HEALTH_TIMEOUT_S", 0.01)
    assert not healthy("hang", EngineError("stopped"))


@pytest.mark.parametrize("accepted", [False, True])
def test_waiting_for_a_replica_is_bounded(monkeypatch: pytest.MonkeyPatch, accepted: bool) -> None:
    """A request that a replica has accepted is waited for without a limit."""
    monkeypatch.setattr(generation, "_NO_REPLICA_S", 0.01)
    handle = Handle(["hang"] if accepted else ["wait"])

    async def run() -> None:
        engines = ServeEngines(handle)  # type: ignore[arg-type]
        await asyncio.wait_for(anext(engines.generate(REQUEST, fit=True)), 0.2 if accepted else 20)

    with pytest.raises(TimeoutError if accepted else EngineError):
        asyncio.run(run())
    assert [r.cancelled for r in handle.responses] == [True]


@pytest.mark.parametrize("failure", [TimeoutError(), DeploymentUnavailableError(DeploymentID("engine"))])
def test_without_replicas_there_are_no_results(failure: Exception) -> None:
    engines = ServeEngines(Broadcasts(failure))  # type: ignore[arg-type]
    assert asyncio.run(engines.stats()) == asyncio.run(engines.metrics()) == []
    assert not asyncio.run(engines.healthy())
