"""Gateways in processes of their own count one limit together, through the owner's actor, and past its loss."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import ray

from loray.errors import RateLimited
from loray.policy.quotas import QuotaGate, Reply, Report
from loray.settings import Settings
from loray.spec import Limits, Principal
from serve_apps.accounting.quotas import RayExchange, follow_owner
from tests.fixtures.cluster import RayCluster

pytestmark = pytest.mark.cluster

NUM_GATEWAYS = 2


class GatewayProcess:
    """A gateway's shares, without its HTTP."""

    def __init__(self, application: str, name: str, settings: Settings) -> None:
        self._gate = QuotaGate(NUM_GATEWAYS)
        self._exchange = RayExchange(application, name, NUM_GATEWAYS, settings)
        self._task: asyncio.Task[None] | None = None
        self._is_quiet = asyncio.Event()

    async def _told(self, reports: Sequence[Report]) -> Reply:
        reply = await self._exchange(reports)
        if not reports and not reply.grants:
            self._is_quiet.set()
        return reply

    async def quiet(self) -> None:
        """Wait until there is nothing to tell, nor to be told."""
        self._is_quiet.clear()
        await self._is_quiet.wait()

    async def ask(self, principal: Principal, number: int, pause_s: float) -> int:
        """How many of so many requests of one token are admitted."""
        if self._task is None:
            self._task = asyncio.create_task(follow_owner(self._gate, self._told))
        admitted = 0
        for _ in range(number):
            try:
                self._gate.admit(principal, 1, time.time()).settle(1, time.time())
                admitted += 1
            except RateLimited:
                pass
            await asyncio.sleep(pause_s)
        return admitted


@pytest.fixture(scope="module")
def gateways(ray_cluster: RayCluster) -> Iterator[list[Any]]:
    actor = ray.remote(num_cpus=0)(GatewayProcess)
    started = [actor.remote("quotas", f"g{i}", ray_cluster.settings) for i in range(NUM_GATEWAYS)]
    yield started
    for gateway in started:
        ray.kill(gateway)


def asked(gateways: list[Any], principal: Principal, numbers: tuple[int, int]) -> int:
    pauses = (0.005, 0.02)  # unlike loads
    calls = [
        gateway.ask.remote(principal, n, pause) for gateway, n, pause in zip(gateways, numbers, pauses, strict=True)
    ]
    return sum(ray.get(calls, timeout=120))


def test_two_gateways_share_one_limit_within_five_per_cent(gateways: list[Any]) -> None:
    """A budget, of which nothing comes back meanwhile: it does not matter how long the test takes."""
    who = Principal(key_id="shared", limits=Limits(max_budget=400, budget_duration="9999d"))
    admitted = asked(gateways, who, (600, 200))
    admitted += asked(gateways, who, (100, 100))  # whoever asks later gets what is left
    assert 380 <= admitted <= 400 + NUM_GATEWAYS


def test_what_was_used_survives_the_owner(gateways: list[Any]) -> None:
    who = Principal(key_id="survives", limits=Limits(max_budget=200, budget_duration="9999d"))
    admitted = asked(gateways, who, (150, 50))
    for gateway in gateways * 2:  # a report that is lost with the owner may count what was given back twice
        ray.get(gateway.quiet.remote(), timeout=60)
    ray.kill(ray.get_actor(f"loray-quotas-quotas-{NUM_GATEWAYS}", namespace="serve"))
    admitted += asked(gateways, who, (800, 200))
    assert 190 <= admitted <= 200 + 2 * NUM_GATEWAYS
