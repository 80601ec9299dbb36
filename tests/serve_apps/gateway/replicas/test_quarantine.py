"""Two gateways, replicas that die by one adapter, and the catalog that both share. Nothing here waits for a clock."""

from __future__ import annotations

import asyncio
import math
import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError

from loray.catalog import Catalog
from loray.errors import AdapterQuarantined, CatalogError, EngineStopped
from loray.policy.quarantine import FIRST_S, TRIAL_S
from loray.spec import AdapterRef
from serve_apps.gateway.errors import failure_of
from serve_apps.gateway.replicas import quarantine, router
from serve_apps.gateway.replicas.engines import ServeEngineClient
from serve_apps.gateway.replicas.quarantine import SharedQuarantine
from tests.fixtures.gateway import adapter_ref
from tests.fixtures.handles import LAST, REQUEST, Handle, engines_of, raised_by, tokens

BAD = adapter_ref("b" * 64, name="bad")
OTHER = replace(BAD, digest="a" * 64, name="other")


class Deployment:
    """Gateways of one deployment. Each replica that gets BAD dies, while `kills`."""

    def __init__(self, url: str) -> None:
        self.url, self.now, self.kills, self.num_deaths = url, 1_000_000.0, True, 0
        self.death: Exception = ActorDiedError()

    @asynccontextmanager
    async def gateway(self, open_catalog: Callable[[], Catalog] | None = None) -> AsyncIterator[ServeEngineClient]:
        replicas = Replicas(self)
        async with engines_of(replicas) as engines:
            engines._quarantine = SharedQuarantine(open_catalog or (lambda: Catalog(self.url)), clock=lambda: self.now)
            yield engines

    @asynccontextmanager
    async def both(self) -> AsyncIterator[tuple[ServeEngineClient, ServeEngineClient]]:
        async with self.gateway() as first, self.gateway() as second:
            yield first, second


class Replicas(Handle):
    """The handle of one gateway."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__()
        self._deployment = deployment

    def remote(self, request, fit, gateway, stream, others):  # type: ignore[no-untyped-def]
        dies = self._deployment.kills and request.adapter is not None and request.adapter.digest == BAD.digest
        self._deployment.num_deaths += dies
        router.own.accepted(request.request_id, f"replica#{self._deployment.num_deaths}")
        self.scripts.append([self._deployment.death] if dies else [LAST])
        return super().remote(request, fit, gateway, stream, others)


@pytest.fixture
def deployment(catalog_url: str, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    monkeypatch.setattr(quarantine, "_TIMEOUT_S", 60.0)
    return Deployment(catalog_url)


async def ask(engines: ServeEngineClient, adapter: AdapterRef | None, name: str = "r") -> list[int]:
    return await tokens(engines, replace(REQUEST, request_id=name, adapter=adapter))


async def refused(engines: ServeEngineClient) -> float:
    """The seconds for which BAD is refused."""
    with pytest.raises(AdapterQuarantined, match="is refused for") as e:
        await ask(engines, BAD)
    assert failure_of(e.value).headers["Retry-After"] == str(math.ceil(e.value.retry_after_s))
    return e.value.retry_after_s


async def test_an_adapter_costs_the_deployment_one_replica(deployment: Deployment) -> None:
    async with deployment.both() as (first, second):
        assert await refused(first) == FIRST_S
        assert [await refused(gateway) for gateway in (second, first)] == [FIRST_S, FIRST_S]
        assert deployment.num_deaths == 1
        assert await ask(second, OTHER) == [2]

    async with deployment.both() as (first, second):
        assert [await refused(gateway) for gateway in (first, second)] == [FIRST_S, FIRST_S]
    assert deployment.num_deaths == 1


async def test_an_adapter_whose_step_stops_an_engine_costs_as_many_replicas_as_one_that_kills_it(
    deployment: Deployment,
) -> None:
    deployment.death = raised_by(pickle.loads(pickle.dumps(EngineStopped("the engine stopped", [BAD.digest]))))

    async with deployment.both() as (first, second):
        with pytest.raises(EngineStopped):  # it is not sent to another replica
            await ask(first, BAD)
        assert [await refused(gateway) for gateway in (second, first)] == [FIRST_S, FIRST_S]
        assert deployment.num_deaths == 1


async def test_an_adapter_that_was_not_in_the_step_is_not_suspected(deployment: Deployment) -> None:
    deployment.death = raised_by(EngineStopped("the engine stopped", [OTHER.digest]))

    async with deployment.both() as (first, second):
        for gateway in (first, second, first):
            with pytest.raises(EngineStopped):
                await ask(gateway, BAD)


async def test_one_that_another_replica_has_is_sent_once_more(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {("replica#1", BAD.digest)}
    monkeypatch.setattr(router, "is_held", lambda deployment, besides, digest: (besides, digest) in held)

    async with deployment.both() as (first, second):
        assert await refused(first) == await refused(second) == 2 * FIRST_S
        assert deployment.num_deaths == 2


async def test_one_gateway_tries_it_again(deployment: Deployment) -> None:
    async with deployment.both() as (first, second):
        await refused(first)
        deployment.now += FIRST_S
        assert await refused(second) == 2 * FIRST_S  # it died of it again
        assert [await refused(first), deployment.num_deaths] == [2 * FIRST_S, 2]
        deployment.now += 2 * FIRST_S
        deployment.kills = False
        other = Catalog(deployment.url)
        due = other.quarantine.all()[BAD.digest].refused_until
        assert due is not None
        assert other.quarantine.try_again(BAD.digest, due, due.fromtimestamp(deployment.now + TRIAL_S, due.tzinfo))
        assert await refused(first) == TRIAL_S  # another gateway tries it
        deployment.now += TRIAL_S  # which had no answer
        assert await ask(second, BAD) == [2]
        await asyncio.gather(*second._quarantine._behind)
        assert other.quarantine.all() == {}
        assert await ask(first, BAD) == [2]
        other.close()


async def test_a_release_is_for_all_gateways(deployment: Deployment) -> None:
    async with deployment.both() as (first, second):
        await refused(first)
        await refused(second)
        deployment.kills = False
        released = Catalog(deployment.url)
        released.quarantine.clear(BAD.digest)
        released.close()
        assert [await ask(gateway, BAD) for gateway in (first, second)] == [[2], [2]]


async def test_only_requests_for_adapters_without_a_token_ask_the_catalog(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0

    def count() -> None:
        nonlocal reads
        reads += 1

    def counting() -> Catalog:
        catalog = Catalog(deployment.url)
        read = catalog.quarantine.all
        monkeypatch.setattr(catalog.quarantine, "all", lambda: (count(), read())[1])
        return catalog

    async with deployment.gateway(counting) as engines:
        await ask(engines, None)
        assert reads == 0
        for name in ("1", "2", "3"):
            assert await ask(engines, OTHER, name) == [2]
        assert reads == 1


async def test_without_the_catalog_a_gateway_goes_on_alone(deployment: Deployment) -> None:
    def away() -> Catalog:
        raise CatalogError("the database is away")

    async with deployment.gateway(away) as engines:
        assert [await refused(engines), await refused(engines)] == [FIRST_S, FIRST_S]
        assert await ask(engines, OTHER) == [2]
    assert deployment.num_deaths == 1
