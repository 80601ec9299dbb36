"""Routing in Serve: which replica a request gets."""

from __future__ import annotations

import asyncio
import time

import pytest
from ray import cloudpickle
from ray.serve._private.common import RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest

from serve_apps.gateway.replicas import router as module
from serve_apps.gateway.replicas.router import ROUTER_CLASS, AdapterRouter, decisions, suspect
from tests.serve_apps.gateway.routed import DIGESTS, Replica, pending, route, with_router


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


def test_retries_pause_while_no_replica_accepts(pair: list[Replica]) -> None:
    for replica in pair:
        replica.queue_len = replica.max_ongoing_requests
    pauses: list[int] = []

    async def pause(attempt: int) -> None:
        pauses.append(attempt)
        if len(pauses) == 3:
            pair[0].queue_len = 0

    async def scenario(router: AdapterRouter) -> None:
        for replica in pair:
            router.on_new_queue_len_info(replica.replica_id, replica.queue_len)
        router._backoff = pause
        assert await route(router, pending(None)) == "one"

    with_router(pair, scenario)
    assert pauses == [0, 1, 2]
    assert sum(replica.num_asked for replica in pair) <= 2 * 6


def test_a_full_replica_is_skipped(pair: list[Replica]) -> None:
    pair[0].report(DIGESTS[0])
    pair[0].queue_len = pair[0].max_ongoing_requests

    async def scenario(router: AdapterRouter) -> None:
        router.on_new_queue_len_info(pair[0].replica_id, pair[0].queue_len)
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
