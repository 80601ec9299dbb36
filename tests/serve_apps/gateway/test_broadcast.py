"""The gateway's questions to all replicas, on a stand-in for a Serve handle."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from loray.errors import EngineError
from loray.policy.routing import Held, RoutingReports
from loray.schemas.status import ReplicaStatus
from serve_apps.channel.connection import Connections
from serve_apps.gateway.replicas import engines as broadcast
from serve_apps.gateway.replicas import engines as generation
from serve_apps.gateway.replicas import router
from serve_apps.gateway.replicas.engines import ServeEngineClient
from tests.serve_apps.channel.plane import NODE, until


class Broadcasts:
    """A handle whose broadcasts return scripted results, or fail."""

    def __init__(self, answers: list[Any] | Exception) -> None:
        self.answers, self.asked = answers, list[str]()

    def options(self, **_: Any) -> Broadcasts:
        return self

    def broadcast(self, method: str, *args: Any) -> Broadcasts:
        self.asked.append(method)
        self.args = args
        return self

    async def _fetch_replica_results_async(self) -> list[Any]:
        return self.results(timeout_s=0.0, return_exceptions=True)

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers


def test_a_silent_replica_does_not_hide_the_others() -> None:
    status = ReplicaStatus(replica="r1", node="n", pid=1, uptime_s=1.0, num_running=1)
    handle: Any = Broadcasts([[], TimeoutError(), status])
    assert asyncio.run(ServeEngineClient(handle, "engine-tiny", NODE, "").metrics()) == [[], None, None]
    assert asyncio.run(ServeEngineClient(handle, "engine-tiny", NODE, "").stats()) == [status]
    assert handle.asked == ["metrics", "stats"]


def test_replicas_are_asked_to_report_at_first_and_whenever_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_ASK_S", 0.001)
    handle: Any = Broadcasts([OSError("it cannot be reached"), None])

    async def run() -> None:
        monkeypatch.setattr(router, "_replicas", {"engine-tiny": frozenset()})
        engines = ServeEngineClient(handle, "engine-tiny", NODE, "127.0.0.1")
        async with engines.running(lambda _: None):
            await until(lambda: len(handle.asked) == 1)
            (address,) = handle.args
            replica = Connections(NODE, "r1", lambda: Held(["a" * 64]))
            await replica.to(address)
            await until(lambda: router.reports.of("r1") is not None)
            monkeypatch.setattr(router, "_replicas", {"engine-tiny": frozenset({"r1"})})
            num_asked = len(handle.asked)
            await asyncio.sleep(0.05)
            assert len(handle.asked) == num_asked == 1
            monkeypatch.setattr(router, "_replicas", {"engine-tiny": frozenset({"r1", "r2"})})
            await until(lambda: len(handle.asked) >= num_asked + 2)  # again and again, until it is connected
        replica.close()
        await engines.close()

    monkeypatch.setattr(router, "reports", RoutingReports())
    asyncio.run(run())
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


def healthy(*answers: Any) -> bool:
    handle: Any = Broadcasts([Answer(what) for what in answers])
    good = asyncio.run(ServeEngineClient(handle, "engine-tiny", NODE, "").healthy())
    assert handle.asked == ["check_health"]
    return good


def test_one_healthy_replica_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "_HEALTH_TIMEOUT_S", 60.0)
    assert healthy("hang", EngineError("stopped"), None)  # at once
    assert not healthy(EngineError("stopped"))
    monkeypatch.setattr(broadcast, "_HEALTH_TIMEOUT_S", 0.01)
    assert not healthy("hang", EngineError("stopped"))


@pytest.mark.parametrize("failure", [TimeoutError(), DeploymentUnavailableError(DeploymentID("engine"))])
def test_without_replicas_there_are_no_results(failure: Exception) -> None:
    handle: Any = Broadcasts(failure)
    engines = ServeEngineClient(handle, "engine-tiny", NODE, "")
    assert asyncio.run(engines.stats()) == asyncio.run(engines.metrics()) == []
    assert not asyncio.run(engines.healthy())
