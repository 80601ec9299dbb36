"""Two gateways, replicas that die by one adapter, and the catalog that both share. Nothing here waits for a clock."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError

from loray.catalog import Catalog
from loray.errors import AdapterQuarantined, CatalogError, EngineStopped
from loray.policy.quarantine import FIRST_S, TRIAL_S
from loray.spec import AdapterRef
from serve_apps.gateway.replicas import engines as generation
from serve_apps.gateway.replicas import quarantine, router
from serve_apps.gateway.replicas.engines import ServeEngineClient
from serve_apps.gateway.replicas.quarantine import SharedQuarantine
from tests.serve_apps.gateway.test_engines import LAST, REQUEST, Handle, engines_of, raised_by, tokens

BAD = AdapterRef(
    digest="b" * 64, name="bad", version=1, method="lora", base_fingerprint="0" * 64, context_length=9, nbytes=1
)
OTHER = replace(BAD, digest="a" * 64, name="other")


class Deployment:
    """Gateways of one deployment. Each replica that gets BAD dies, while `kills`."""

    def __init__(self, url: str) -> None:
        self.url, self.now, self.kills, self.num_deaths = url, 1_000_000.0, True, 0
        self.death: Exception = ActorDiedError()
        self.num_asked = 0

    def catalog(self) -> Catalog:
        self.num_asked += 1
        return Catalog(self.url)

    @asynccontextmanager
    async def gateway(self, open_records: Callable[[], Catalog] | None = None) -> AsyncIterator[ServeEngineClient]:
        replicas = Replicas(self)
        async with engines_of(replicas) as engines:
            engines._quarantine = SharedQuarantine(open_records or self.catalog, clock=lambda: self.now)
            yield engines


class Replicas(Handle):
    """The handle of one gateway."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__()
        self._deployment = deployment

    def remote(self, request, fit, gateway, stream):  # type: ignore[no-untyped-def]
        dies = self._deployment.kills and request.adapter is not None and request.adapter.digest == BAD.digest
        self._deployment.num_deaths += dies
        router._placed[request.request_id] = f"replica#{self._deployment.num_deaths}"
        self.scripts.append([self._deployment.death] if dies else [LAST])
        return super().remote(request, fit, gateway, stream)


@pytest.fixture
def deployment(catalog_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    monkeypatch.setattr(generation, "_BACKOFF_S", 0.0)
    monkeypatch.setattr(quarantine, "_TIMEOUT_S", 60.0)
    yield Deployment(catalog_url)
    router._placed.clear()


async def ask(engines: ServeEngineClient, adapter: AdapterRef | None, name: str = "r") -> list[int]:
    return await tokens(engines, replace(REQUEST, request_id=name, adapter=adapter))


async def refused(engines: ServeEngineClient) -> float:
    """The seconds for which BAD is refused."""
    with pytest.raises(AdapterQuarantined) as e:
        await ask(engines, BAD)
    return e.value.retry_after_s


def run(deployment: Deployment, story: Callable[[ServeEngineClient, ServeEngineClient], object]) -> None:
    async def told() -> None:
        async with AsyncExitStack() as held:
            both = [await held.enter_async_context(deployment.gateway()) for _ in range(2)]
            await story(*both)  # type: ignore[misc]

    asyncio.run(told())


def test_an_adapter_costs_the_deployment_one_replica(deployment: Deployment) -> None:
    async def story(first: ServeEngineClient, second: ServeEngineClient) -> None:
        assert await refused(first) == FIRST_S
        assert [await refused(gateway) for gateway in (second, first)] == [FIRST_S, FIRST_S]
        assert deployment.num_deaths == 1
        assert await ask(second, OTHER) == [2]

    run(deployment, story)

    async def after_a_restart(first: ServeEngineClient, second: ServeEngineClient) -> None:
        assert [await refused(gateway) for gateway in (first, second)] == [FIRST_S, FIRST_S]

    run(deployment, after_a_restart)
    assert deployment.num_deaths == 1


def test_an_adapter_whose_step_stops_an_engine_costs_as_many_replicas_as_one_that_kills_it(
    deployment: Deployment,
) -> None:
    deployment.death = raised_by(pickle.loads(pickle.dumps(EngineStopped("the engine stopped", [BAD.digest]))))

    async def story(first: ServeEngineClient, second: ServeEngineClient) -> None:
        with pytest.raises(EngineStopped):  # it is not sent to another replica
            await ask(first, BAD)
        assert [await refused(gateway) for gateway in (second, first)] == [FIRST_S, FIRST_S]
        assert deployment.num_deaths == 1

    run(deployment, story)


def test_an_adapter_that_was_not_in_the_step_is_not_suspected(deployment: Deployment) -> None:
    deployment.death = raised_by(EngineStopped("the engine stopped", [OTHER.digest]))

    async def story(first: ServeEngineClient, second: ServeEngineClient) -> None:
        for gateway in (first, second, first):
            with pytest.raises(EngineStopped):
                await ask(gateway, BAD)

    run(deployment, story)


def test_one_that_another_replica_has_is_sent_once_more(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {("replica#1", BAD.digest)}
    monkeypatch.setattr(router, "is_held", lambda deployment, besides, digest: (besides, digest) in held)

    async def story(first: ServeEngineClient, second: ServeEngineClient) -> None:
        assert await refused(first) == await refused(second) == 2 * FIRST_S
        assert deployment.num_deaths == 2

    run(deployment, story)


def test_one_gateway_tries_it_again(deployment: Deployment) -> None:
    async def story(first: ServeEngineClient, second: ServeEngineClient) -> None:
        await refused(first)
        deployment.now += FIRST_S
        assert await refused(second) == 2 * FIRST_S  # it died of it again
        assert [await refused(first), deployment.num_deaths] == [2 * FIRST_S, 2]
        deployment.now += 2 * FIRST_S
        deployment.kills = False
        other = Catalog(deployment.url)
        due = other.quarantined()[BAD.digest].refused_until
        assert due is not None
        assert other.try_again(BAD.digest, due, due.fromtimestamp(deployment.now + TRIAL_S, due.tzinfo))
        assert await refused(first) == TRIAL_S  # another gateway tries it
        deployment.now += TRIAL_S  # which had no answer
        assert await ask(second, BAD) == [2]
        await asyncio.gather(*second._quarantine._behind)
        assert other.quarantined() == {}
        assert await ask(first, BAD) == [2]
        other.close()

    run(deployment, story)


def test_a_release_is_for_all_gateways(deployment: Deployment) -> None:
    async def story(first: ServeEngineClient, second: ServeEngineClient) -> None:
        await refused(first)
        await refused(second)
        deployment.kills = False
        released = Catalog(deployment.url)
        released.clear_quarantine(BAD.digest)
        released.close()
        assert [await ask(gateway, BAD) for gateway in (first, second)] == [[2], [2]]

    run(deployment, story)


def test_only_requests_for_adapters_without_a_token_ask_the_catalog(deployment: Deployment) -> None:
    reads = 0

    class Counting(Catalog):
        def quarantined(self):  # type: ignore[no-untyped-def]
            nonlocal reads
            reads += 1
            return super().quarantined()

    async def story() -> None:
        async with deployment.gateway(lambda: Counting(deployment.url)) as engines:
            await ask(engines, None)
            assert reads == 0
            for name in ("1", "2", "3"):
                assert await ask(engines, OTHER, name) == [2]
            assert reads == 1

    asyncio.run(story())


def test_without_the_catalog_a_gateway_goes_on_alone(deployment: Deployment) -> None:
    def away() -> Catalog:
        raise CatalogError("the database is away")

    async def story() -> None:
        async with deployment.gateway(away) as engines:
            assert [await refused(engines), await refused(engines)] == [FIRST_S, FIRST_S]
            assert await ask(engines, OTHER) == [2]

    asyncio.run(story())
    assert deployment.num_deaths == 1
