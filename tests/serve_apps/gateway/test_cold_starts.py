"""A base that has no replica: its requests wait for one to be started, for a limited time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from loray.errors import BaseStarting, EngineError
from loray.schemas.status import AutoscalingStatus
from serve_apps.gateway.errors import failure_of
from serve_apps.gateway.replicas import engines as call
from serve_apps.gateway.replicas import router
from tests.serve_apps.gateway.test_engines import REQUEST, Handle, engines_of, tokens


@pytest.mark.parametrize("running", [(), ("r1",)])
def test_a_base_without_replicas_is_waited_for_longer(
    monkeypatch: pytest.MonkeyPatch, running: tuple[str, ...]
) -> None:
    """While one runs, and takes no requests, the wait is the usual one."""
    monkeypatch.setattr(call, "_NO_REPLICA_S", 0.01)
    monkeypatch.setattr(router, "_replicas", {"engine-tiny": frozenset(running)})
    handle = Handle(["wait"])

    async def run() -> None:
        async with engines_of(handle, cold_start_timeout_s=0.02) as engines:
            await asyncio.wait_for(anext(engines.generate(REQUEST, fit=True)), 20)

    with pytest.raises(EngineError) as raised:
        asyncio.run(run())
    failure = failure_of(raised.value)
    if running:
        assert (failure.status, failure.error.code) == (503, "engine_unavailable")
        return
    assert (failure.status, failure.error.code, failure.headers["Retry-After"]) == (503, "base_starting", "10")
    assert "was not ready after 0.02 s; send the request again" in failure.error.message


def test_the_last_replica_stops_while_a_request_is_sent_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits as one that has come later, and a start that fails is remembered until a replica runs."""
    monkeypatch.setattr(call, "_NO_REPLICA_S", 0.3)  # long enough for the replica to stop before
    monkeypatch.setattr(router, "_replicas", {"engine-tiny": frozenset(("r1",))})

    async def run() -> list[bool]:
        async with engines_of(Handle(["wait"]), cold_start_timeout_s=0.05) as engines:
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
            return [*failed, engines.start_failed()]

    assert asyncio.run(run()) == [False, True, False]


def test_a_replica_is_wanted_while_a_request_waits_for_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve starts it without the policy, whose last decision was none."""
    monkeypatch.setattr(router, "_replicas", {})

    async def last_decision() -> AutoscalingStatus:
        return AutoscalingStatus(target=0, reason="no request", time=1.0)

    async def run() -> list[int]:
        async with engines_of(Handle(["wait"]), cold_start_timeout_s=60) as engines:
            monkeypatch.setattr(engines, "_replicas", SimpleNamespace(autoscaling=last_decision))
            wanted = [await engines.autoscaling()]
            task = asyncio.create_task(tokens(engines))
            while not engines._cold:
                await asyncio.sleep(0)
            wanted.append(await engines.autoscaling())
            task.cancel()
            await asyncio.wait([task])
            wanted.append(await engines.autoscaling())
            return [w.target for w in wanted if w is not None]

    assert asyncio.run(run()) == [0, 1, 0]
