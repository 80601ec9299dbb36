"""The gateway's questions to all replicas, on a stand-in for a Serve handle."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from loray.api.status import ReplicaStatus
from loray.errors import EngineError
from serve_apps.gateway.replicas import broadcast
from serve_apps.gateway.replicas.engines import ServeEngines

NODE = "node"


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


def test_a_silent_replica_does_not_hide_the_others() -> None:
    status = ReplicaStatus(replica="r1", node="n", pid=1, uptime_s=1.0, num_running=1)
    handle: Any = Broadcasts([[], TimeoutError(), status])
    assert asyncio.run(ServeEngines(handle, NODE, "").metrics()) == [[], None, None]
    assert asyncio.run(ServeEngines(handle, NODE, "").stats()) == [status]
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
    good = asyncio.run(ServeEngines(handle, NODE, "").healthy())
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
    engines = ServeEngines(handle, NODE, "")
    assert asyncio.run(engines.stats()) == asyncio.run(engines.metrics()) == []
    assert not asyncio.run(engines.healthy())
