"""Routing in Serve: Ray's RequestRouter with stand-in replicas, without a cluster."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID

from loray.serving.routing_report import Held, RoutingReports, RoutingSeries
from loray.spec import AdapterRef, GenerateRequest, SamplingParams
from serve_apps.gateway.replicas import router as module
from serve_apps.gateway.replicas.router import ROUTER_CLASS, AdapterRouter, decisions, suspect

ENGINE = DeploymentID("engine", "app")
DIGESTS = [f"{i:064x}"[::-1] for i in range(1 << 40, (1 << 40) + 20)]


class Replica:
    """Stands in for RunningReplica, which needs an actor. It reports the length of its queue only when asked."""

    def __init__(self, name: str, *, limit: int = 50) -> None:
        self.replica_id = ReplicaID(name, ENGINE)
        self.max_ongoing_requests = limit
        self.node_id = self.availability_zone = None
        self.multiplexed_model_ids: list[str] = []
        self.queue_len = self.num_asked = 0
        self._series = RoutingSeries(name)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.num_asked += 1
        return self.queue_len

    def report(self, *in_pool: str, on_host: tuple[str, ...] = ()) -> None:
        """It holds nothing else now."""
        for delta in self._series.deltas(Held(in_pool, on_host)):
            assert module.reports.take(str(self.replica_id.unique_id), delta, time.monotonic())


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_decisions", {})
    monkeypatch.setattr(module, "_suspects", {})
    monkeypatch.setattr(module, "reports", RoutingReports())


numbers = itertools.count()


def pending(digest: str | None, *, http_request: str | None = None) -> PendingRequest:
    """A pending call of `generate`, as Serve creates it. Calls of one HTTP request share its id."""
    number = next(numbers)
    adapter = digest and AdapterRef(
        digest=digest, name="a", version=1, method="lora", base_fingerprint="0" * 64, context_length=64, nbytes=1
    )
    metadata = RequestMetadata(f"r{number}", http_request or f"i{number}", call_method="generate")
    return PendingRequest([GenerateRequest(f"r{number}", (1,), SamplingParams(), adapter or None), True], {}, metadata)


def with_router(replicas: list[Replica], scenario: Callable[[AdapterRouter], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        router = AdapterRouter(
            ENGINE, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True, initial_backoff_s=0.001
        )
        router.initialize_state(floor=4)
        router.update_replicas(replicas)
        await asyncio.wait_for(scenario(router), timeout=20)

    asyncio.run(run())


async def route(router: AdapterRouter, request: PendingRequest) -> str:
    """Routes a request as Serve's AsyncioRouter does, to a replica that accepts it."""
    replica = await router._choose_replica_for_request(request)
    router.on_send_request(replica.replica_id)
    router.on_request_routed(request, replica.replica_id, None)
    return str(replica.replica_id.unique_id)


@pytest.fixture
def pair() -> list[Replica]:
    return [Replica("one"), Replica("two")]


def test_serve_pickles_the_class_by_reference() -> None:
    """If it were pickled by value, as classes that the module defines are, every router would have its own counters."""
    config = RequestRouterConfig(request_router_class=ROUTER_CLASS)
    assert cloudpickle.loads(config.get_serialized_request_router_cls()) is AdapterRouter


def test_a_holder_is_found_and_the_reasons_are_counted(pair: list[Replica]) -> None:
    pair[0].report(DIGESTS[0], on_host=(DIGESTS[2],))
    pair[1].report(DIGESTS[1])

    async def scenario(router: AdapterRouter) -> None:
        assert [await route(router, pending(d)) for d in DIGESTS[:3]] == ["one", "two", "one"]
        await route(router, pending(None))
        first = await route(router, pending(DIGESTS[3]))
        assert await route(router, pending(DIGESTS[3])) == first
        await route(router, PendingRequest([], {}, RequestMetadata("c", "c", call_method="capacity")))

    with_router(pair, scenario)
    counts = decisions("engine")
    assert counts["pool"] == 2
    assert counts["host"] == counts["base"] == counts["recent"] == 1
    assert counts["hash"] + counts["overflow"] == 1
    assert sum(counts.values()) == 6


def test_reports_replace_what_was_said_before(pair: list[Replica]) -> None:
    async def scenario(router: AdapterRouter) -> None:
        home = await route(router, pending(DIGESTS[0]))
        elsewhere = pair[home == "one"]
        elsewhere.report(DIGESTS[0])
        assert await route(router, pending(DIGESTS[0])) == elsewhere.replica_id.unique_id
        elsewhere.report()
        assert await route(router, pending(DIGESTS[0])) == home
        elsewhere.report(DIGESTS[0])
        module.reports.alive(elsewhere.replica_id.unique_id, time.monotonic() - 60.0)  # then it was silent
        assert await route(router, pending(DIGESTS[0])) == home

    with_router(pair, scenario)


def test_a_report_ends_what_the_router_remembers_of_an_adapter(pair: list[Replica]) -> None:
    """Once the replica has reported the adapter, only its reports say whether it still holds it."""

    async def scenario(router: AdapterRouter) -> None:
        home = await route(router, pending(DIGESTS[0]))
        holder = pair[home == "two"]
        assert await route(router, pending(DIGESTS[0])) == home
        holder.report(on_host=(DIGESTS[0],))
        assert await route(router, pending(DIGESTS[0])) == home
        holder.report()
        await route(router, pending(DIGESTS[0]))
        assert [decisions("engine")[reason] for reason in ("recent", "host")] == [1, 1]
        assert module.replicas("engine") == {"one", "two"}

    with_router(pair, scenario)


def test_calls_that_share_an_id_are_routed_separately(pair: list[Replica]) -> None:
    """Serve gives all calls of one HTTP request (`n=4`, several prompts) the same internal id."""
    for replica, digests in zip(pair, (DIGESTS[:4], DIGESTS[4:8]), strict=True):
        replica.report(*digests)

    async def scenario(router: AdapterRouter) -> None:
        requests = [pending(d, http_request="shared") for d in DIGESTS[:8]]
        assert await asyncio.gather(*(route(router, r) for r in requests)) == ["one"] * 4 + ["two"] * 4

    with_router(pair, scenario)


def test_many_at_once_keep_to_their_replicas(pair: list[Replica]) -> None:
    """Serve's FIFOMixin would give a replica chosen for one adapter to the request that has waited longest."""
    for replica, digests in zip(pair, (DIGESTS[::2], DIGESTS[1::2]), strict=True):
        replica.report(*digests)

    async def scenario(router: AdapterRouter) -> None:
        routed = await asyncio.gather(*(route(router, pending(d)) for d in DIGESTS))
        assert routed == ["one", "two"] * 10

    with_router(pair, scenario)


@pytest.mark.parametrize("at_once", [1, 20])
def test_an_adapter_in_high_demand_overflows(pair: list[Replica], at_once: int) -> None:
    """Also if none of the requests has been sent when the last one gets its replica."""
    pair[0].report(DIGESTS[0])

    async def scenario(router: AdapterRouter) -> None:
        routed: list[str] = []
        for replica in pair:
            router.on_new_queue_len_info(replica.replica_id, 0)
        while len(routed) < 20:
            routed += await asyncio.gather(*(route(router, pending(DIGESTS[0])) for _ in range(at_once)))
        assert routed.count("two") == 9  # one request more than the mean stays with the holder
        assert decisions("engine")["overflow"] >= 1

    with_router(pair, scenario)


def test_a_load_is_known_for_longer_than_serve_remembers_it(pair: list[Replica]) -> None:
    pair[0].report(DIGESTS[0])

    async def scenario(router: AdapterRouter) -> None:
        for _ in range(5):
            router.on_send_request(pair[0].replica_id)
        pair[0].queue_len = 5
        router.on_new_queue_len_info(pair[1].replica_id, 0)
        for replica in pair:
            router.replica_queue_len_cache.invalidate_key(replica.replica_id)
        assert await first_choice(router, pair) == "two"
        for _ in range(5):
            router.decrement_queue_len_cache(pair[0].replica_id)
        assert await first_choice(router, pair) == "one"

    with_router(pair, scenario)


async def first_choice(router: AdapterRouter, replicas: list[Replica]) -> str:
    (first, *_), *_ = await router.choose_replicas(replicas, pending(DIGESTS[0]))
    return str(first.replica_id.unique_id)


def test_a_broadcast_does_not_hide_requests_under_way(pair: list[Replica]) -> None:
    """`/status` is a broadcast. If Serve has forgotten the length of a queue, it counts the broadcast from 0."""
    pair[0].report(DIGESTS[0])

    async def scenario(router: AdapterRouter) -> None:
        await asyncio.sleep(0)
        for _ in range(5):
            router.on_send_request(pair[0].replica_id)
        router.replica_queue_len_cache.invalidate_key(pair[0].replica_id)
        router.on_send_request(pair[0].replica_id)
        router.decrement_queue_len_cache(pair[0].replica_id)
        assert router.replica_queue_len_cache.get(pair[0].replica_id) == 0
        assert await first_choice(router, pair) == "two"

    with_router(pair, scenario)


def test_requests_that_never_arrived_are_forgotten(pair: list[Replica]) -> None:
    """Serve reports that a request is sent, but not that it was cancelled before the replica accepted it."""
    pair[0].report(DIGESTS[0])

    async def scenario(router: AdapterRouter) -> None:
        await asyncio.sleep(0)
        for _ in range(5):
            router.on_send_request(pair[0].replica_id)
        router.replica_queue_len_cache.invalidate_key(pair[0].replica_id)  # as it does after ten seconds
        assert await first_choice(router, pair) == "two"
        assert router._probing is not None
        await asyncio.wait_for(router._probing, timeout=10)
        assert await first_choice(router, pair) == "one"

    with_router(pair, scenario)


def test_retries_pause_while_no_replica_accepts(pair: list[Replica]) -> None:
    for replica in pair:
        replica.queue_len = replica.max_ongoing_requests
    pauses: list[int] = []

    async def pause(attempt: int) -> None:
        pauses.append(attempt)
        if len(pauses) == 3:
            pair[0].queue_len = 0

    async def scenario(router: AdapterRouter) -> None:
        await asyncio.sleep(0)
        router._backoff = pause
        assert await route(router, pending(None)) == "one"

    with_router(pair, scenario)
    assert pauses == [0, 1, 2]
    assert sum(replica.num_asked for replica in pair) <= 2 * 6


def test_a_full_replica_is_skipped(pair: list[Replica]) -> None:
    pair[0].report(DIGESTS[0])
    pair[0].queue_len = pair[0].max_ongoing_requests

    async def scenario(router: AdapterRouter) -> None:
        await asyncio.sleep(0)
        assert await route(router, pending(DIGESTS[0])) == "two"

    with_router(pair, scenario)


@pytest.mark.parametrize("seen_by", ["the gateway", "Serve"])
def test_after_a_failure_the_other_replica_is_asked(pair: list[Replica], seen_by: str) -> None:
    pair[0].report(DIGESTS[0])

    async def scenario(router: AdapterRouter) -> None:
        if seen_by == "Serve":
            router.on_replica_actor_unavailable(pair[0].replica_id)
        else:
            suspect("one")
        assert await route(router, pending(DIGESTS[0])) == "two"
        assert await route(router, pending(None)) == "two"
        router.update_replicas(pair[:1])
        assert await route(router, pending(DIGESTS[0])) == "one"  # rather than not at all

    with_router(pair, scenario)


def test_without_a_request_every_replica_is_offered(pair: list[Replica]) -> None:
    async def scenario(router: AdapterRouter) -> None:
        offered = await router.choose_replicas(pair)
        assert sorted(r.replica_id.unique_id for (r,) in offered) == ["one", "two"]

    with_router(pair, scenario)
