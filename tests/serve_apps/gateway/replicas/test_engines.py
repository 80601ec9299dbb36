"""The gateway's use of a Serve handle, on a stand-in: retries, translated errors, cancellation, waits, broadcasts."""

from __future__ import annotations

import asyncio
import math
import pickle
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from loray.encryption import client_context
from loray.errors import BaseStarting, ContextLengthExceeded, EngineError, Overloaded, ReplicaUnavailable, RequestError
from loray.policy.routing import Held, RoutingReports
from loray.schemas.status import AutoscalingStatus, ReplicaStatus
from loray.spec import GenerateRequest, SamplingParams, ServeSpec
from serve_apps.channel.connection import Connections
from serve_apps.gateway.errors import failure_of
from serve_apps.gateway.replicas import engines as module
from serve_apps.gateway.replicas import router
from serve_apps.gateway.replicas.engines import ATTEMPTS, ServeEngineClient
from tests.fixtures.authority import Authority
from tests.fixtures.channel import NODE, Out, until
from tests.fixtures.handles import LAST, REQUEST, Handle, Response, engines_of, raised_by, tokens

FULL = Overloaded("full", 3.0)
FROM_ZERO = {"min_replicas": 0, "max_replicas": 2}


async def collect(handle: Handle, **spec: Any) -> list[int]:
    async with engines_of(handle, **spec) as engines:
        return await tokens(engines)


# -- calls ------------------------------------------------------------------------------------------------------------


async def test_a_request_of_a_lost_replica_is_retried_before_its_first_token() -> None:
    handle = Handle([ActorDiedError()], [raised_by(ReplicaUnavailable("stopped"))], [Out(1), LAST, "return"])
    assert await collect(handle) == [1, 2]
    assert [r.request_id for r in handle.requests] == ["r", "r-1", "r-2"]
    assert await collect(Handle(["break", "return"], [LAST])) == [2]  # it returns, and sends nothing
    handle = Handle(*[[ActorDiedError()]] * ATTEMPTS)
    with pytest.raises(EngineError, match="lost; send it again"):
        await collect(handle)
    assert not handle.scripts


async def test_a_replica_whose_engine_has_stopped_is_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    avoided: list[str] = []
    monkeypatch.setattr(router, "suspect", avoided.append)
    error = pickle.loads(pickle.dumps(ReplicaUnavailable("stopped", "r7")))  # as it comes from the replica's process
    assert await collect(Handle([raised_by(error)], [LAST])) == [2]
    assert avoided == ["r7"]


@pytest.mark.parametrize("before", [[], [Out(1)]])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (raised_by(RequestError("bad", "prompt")), RequestError),
        (raised_by(ContextLengthExceeded("too long", "prompt")), ContextLengthExceeded),
        (raised_by(FULL), Overloaded),
        (raised_by(EngineError("the engine stopped")), EngineError),
        (raised_by(ZeroDivisionError("x")), ZeroDivisionError),
        (BackPressureError(5, 5), Overloaded),
    ],
)
async def test_errors_have_the_class_that_the_replica_raised_and_are_not_retried(
    before: list[Out], error: Exception, expected: type[Exception]
) -> None:
    handle = Handle([*before, error])
    with pytest.raises(expected) as e:
        await collect(handle)
    assert not isinstance(e.value, RayTaskError)
    if expected is RequestError:
        assert (e.value.param, str(e.value)) == ("prompt", "bad")  # type: ignore[attr-defined]
    assert handle.responses[0].cancelled  # Serve keeps a call that has not been read to its end
    assert len(handle.requests) == 1


async def test_a_stream_ends_with_its_last_token_whatever_its_call_does() -> None:
    assert await collect(Handle([Out(1), LAST, "hang"])) == [1, 2]
    assert await collect(Handle([Out(1), LAST, ActorDiedError()])) == [1, 2]


async def test_tokens_that_come_after_the_call_has_returned_are_waited_for() -> None:
    handle = Handle([Out(1), "return", "hang"])
    async with engines_of(handle) as engines, aclosing(engines.generate(REQUEST, fit=True)) as deltas:
        first = await anext(deltas)
        (response,) = handle.responses
        rest = asyncio.create_task(anext(deltas))
        await asyncio.sleep(0.01)
        assert not rest.done()
        assert response._to is not None
        response._to.send([(response._stream, LAST)])
        assert [*first.token_ids, *(await rest).token_ids] == [1, 2]


@pytest.mark.parametrize("script", [[Out(1), "break", "hang"], [Out(1), "break", "return"]])
async def test_a_connection_that_breaks_in_a_stream_is_a_lost_replica(script: list[Any]) -> None:
    handle = Handle(script)
    with pytest.raises(ReplicaUnavailable, match="lost; send it again"):
        await collect(handle, max_resumes=0)
    assert len(handle.requests) == 1


# -- readers that leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [("x",), ()])
async def test_closing_ends_the_request_over_the_connection(stop: tuple[str, ...]) -> None:
    handle = Handle([Out(1), "hang"])
    async with engines_of(handle) as engines:
        request = GenerateRequest("r", (1, 2), SamplingParams(stop=stop))
        async with aclosing(engines.generate(request, fit=False)) as deltas:
            await anext(deltas)
        (response,) = handle.responses
        await until(lambda: bool(response.left))
        assert (response.left, response.cancelled) == (["stop" if stop else "abort"], False)


@pytest.mark.parametrize("script", [["hang"], ["wait"]])
async def test_a_task_that_is_cancelled_before_the_first_token_cancels_the_call(script: list[Any]) -> None:
    handle = Handle(script)
    async with engines_of(handle) as engines:
        task = asyncio.create_task(tokens(engines))
        while not handle.responses or (script == ["hang"] and handle.responses[0]._to is None):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert [r.cancelled for r in handle.responses] == [True]


async def test_a_call_that_is_accepted_in_the_moment_in_which_its_reader_leaves() -> None:
    """Serve's own `cancel` does not see what nobody has read yet, and would keep the call in the gateway."""
    handle = Handle(["wait"])
    async with engines_of(handle) as engines:
        task = asyncio.create_task(tokens(engines))
        await asyncio.sleep(0.01)
        (response,) = handle.responses
        accepted = Response([], response._gateway, response._stream)
        response._replica_result_future.set_result(accepted)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (response.cancelled, accepted.cancelled) == (False, True)


# -- waits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accepted", [False, True])
async def test_waiting_for_a_replica_is_bounded(monkeypatch: pytest.MonkeyPatch, accepted: bool) -> None:
    """A request that a replica has accepted is waited for without a limit."""
    monkeypatch.setattr(module, "_NO_REPLICA_S", 0.2)
    handle = Handle(["hang"] if accepted else ["wait"])
    with pytest.raises(TimeoutError if accepted else EngineError):
        async with engines_of(handle) as engines:
            await asyncio.wait_for(anext(engines.generate(REQUEST, fit=True)), 0.6 if accepted else 20)
    assert [r.cancelled for r in handle.responses] == [True]


@pytest.mark.parametrize("running", [(), ("r1",)])
async def test_a_base_without_replicas_is_waited_for_longer(
    monkeypatch: pytest.MonkeyPatch, running: tuple[str, ...]
) -> None:
    """While one runs, and takes no requests, the wait is the usual one."""
    monkeypatch.setattr(module, "_NO_REPLICA_S", 0.01)
    monkeypatch.setattr(router, "_replicas", {"engine-tiny": frozenset(running)})
    with pytest.raises(EngineError) as raised:
        await collect(Handle(["wait"]), autoscaling=FROM_ZERO, cold_start_timeout_s=0.02)
    failure = failure_of(raised.value)
    if running:
        assert (failure.status, failure.error.code) == (503, "engine_unavailable")
        return
    assert (failure.status, failure.error.code, failure.headers["Retry-After"]) == (503, "base_starting", "10")
    assert "was not ready after 0.02 s; send the request again" in failure.error.message


async def test_the_last_replica_stops_while_a_request_is_sent_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits as one that has come later, and a start that fails is remembered until a replica runs."""
    monkeypatch.setattr(module, "_NO_REPLICA_S", 0.3)  # long enough for the replica to stop before
    monkeypatch.setattr(router, "_replicas", {"engine-tiny": frozenset(("r1",))})
    async with engines_of(Handle(["wait"]), autoscaling=FROM_ZERO, cold_start_timeout_s=0.05) as engines:
        task = asyncio.create_task(tokens(engines))
        while not engines._reading:
            await asyncio.sleep(0)
        monkeypatch.setattr(router, "_replicas", {})
        while not engines._cold:
            await asyncio.sleep(0)
        failed = [engines.start_failed()]
        with pytest.raises(BaseStarting, match=r"not ready after 0\.05 s"):
            await asyncio.wait_for(task, 20)
        failed.append(engines.start_failed())
        monkeypatch.setattr(router, "_replicas", {"engine-tiny": frozenset(("r2",))})
        assert [*failed, engines.start_failed()] == [False, True, False]


async def test_a_replica_is_wanted_while_a_request_waits_for_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve starts it without the policy, whose last decision was none."""
    monkeypatch.setattr(router, "_replicas", {})

    async def last_decision() -> AutoscalingStatus:
        return AutoscalingStatus(target=0, reason="no request", time=1.0)

    async with engines_of(Handle(["wait"]), autoscaling=FROM_ZERO, cold_start_timeout_s=60) as engines:
        monkeypatch.setattr(engines, "_replicas", SimpleNamespace(autoscaling=last_decision))
        wanted = [await engines.autoscaling()]
        task = asyncio.create_task(tokens(engines))
        while not engines._cold:
            await asyncio.sleep(0)
        wanted.append(await engines.autoscaling())
        task.cancel()
        await asyncio.wait([task])
        wanted.append(await engines.autoscaling())
        assert [w.target for w in wanted if w is not None] == [0, 1, 0]


async def test_a_gateway_is_told_how_late_tokens_come_by_what_they_may_be() -> None:
    told: list[float] = []
    handle = Handle([Out(1), LAST, "return"])
    async with engines_of(handle, max_token_lateness=0.5) as engines, engines.running(told.append):
        await tokens(engines)
        assert 0 < engines._shortest.value < math.inf
        engines._late(3 * engines._shortest.value)
    assert told[-1] == pytest.approx(6), "half of the shortest time to a first token is allowed"


# -- questions to all replicas ----------------------------------------------------------------------------------------


def client_of(answers: Any) -> tuple[Handle, ServeEngineClient]:
    handle: Any = Handle(answers=answers)
    return handle, ServeEngineClient(handle, ServeSpec(base="tiny"), NODE, "127.0.0.1")


async def test_a_gateway_of_a_cluster_with_tls_takes_nobody_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    env = Authority(tmp_path).node("127.0.0.1")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    secure, plain = Connections("another", "secure", tls=client_context(env)), Connections("another", "plain")
    async with engines_of(Handle()) as engines:
        gateway = await engines._listening()
        assert (await secure.to(gateway.address)).is_open
        with pytest.raises(OSError):
            await plain.to(gateway.address)
        assert gateway.replicas() == {"secure"}
        secure.close()
        await until(lambda: not gateway._all)


async def test_a_silent_replica_does_not_hide_the_others() -> None:
    status = ReplicaStatus(replica="r1", node="n", pid=1, uptime_s=1.0, num_running=1)
    handle, engines = client_of([[], TimeoutError(), status])
    assert await engines.metrics() == [[], None, None]
    assert await engines.stats() == [status]
    assert handle.asked == ["metrics", "stats"]


async def test_replicas_are_asked_to_report_at_first_and_whenever_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ASK_S", 0.001)
    monkeypatch.setattr(router, "reports", RoutingReports())
    monkeypatch.setattr(router, "_replicas", {"engine-tiny": frozenset()})
    handle, engines = client_of([OSError("it cannot be reached"), None])
    async with engines.running(lambda _: None):
        await until(lambda: len(handle.asked) == 1)
        (address,) = handle.args
        replica = Connections(NODE, "r1", lambda: Held(["a" * 64]))
        await replica.to(address)
        await until(lambda: router.reports.of("r1") is not None)
        monkeypatch.setattr(router, "_replicas", {"engine-tiny": frozenset({"r1"})})
        await asyncio.sleep(0.05)
        assert len(handle.asked) == 1
        monkeypatch.setattr(router, "_replicas", {"engine-tiny": frozenset({"r1", "r2"})})
        await until(lambda: len(handle.asked) >= 3)  # again and again, until it is connected
    replica.close()
    await engines.close()
    assert set(handle.asked) == {"report_to"}


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


async def test_one_healthy_replica_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    async def healthy(*answers: Any) -> bool:
        handle, engines = client_of([Answer(what) for what in answers])
        good = await engines.healthy()
        assert handle.asked == ["check_health"]
        return good

    monkeypatch.setattr(module, "_HEALTH_TIMEOUT_S", 60.0)
    assert await healthy("hang", EngineError("stopped"), None)  # at once
    assert not await healthy(EngineError("stopped"))
    monkeypatch.setattr(module, "_HEALTH_TIMEOUT_S", 0.01)
    assert not await healthy("hang", EngineError("stopped"))


@pytest.mark.parametrize("failure", [TimeoutError(), DeploymentUnavailableError(DeploymentID("engine"))])
async def test_without_replicas_there_are_no_results(failure: Exception) -> None:
    _, engines = client_of(failure)
    assert [*await engines.stats(), *await engines.metrics()] == []
    assert not await engines.healthy()
