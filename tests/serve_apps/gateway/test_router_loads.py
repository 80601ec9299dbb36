"""Routing in Serve: what a router knows of the replicas' loads."""

from __future__ import annotations

import asyncio
import time

import pytest

from serve_apps.gateway.replicas import router as module
from serve_apps.gateway.replicas.router import AdapterRouter, decisions
from tests.serve_apps.gateway.routed import DIGESTS, Replica, pending, route, with_router


@pytest.mark.parametrize(("at_once", "num_long"), [(1, 0), (20, 0), (20, 2)])
def test_an_adapter_in_high_demand_overflows(pair: list[Replica], at_once: int, num_long: int) -> None:
    """Also if none of the requests has been sent when the last one gets its replica, and if Serve has forgotten the
    lengths of the queues, be they empty or not.
    """
    pair[0].report(DIGESTS[0])

    async def scenario(router: AdapterRouter) -> None:
        routed: list[str] = []
        for replica in pair:
            replica.queue_len = num_long
            router.on_new_queue_len_info(replica.replica_id, num_long)
            router.replica_queue_len_cache.invalidate_key(replica.replica_id)
        while len(routed) < 20:
            routed += await asyncio.gather(*(route(router, pending(DIGESTS[0])) for _ in range(at_once)))
        assert routed.count("two") == 9  # one request more than the mean stays with the holder
        assert decisions("engine")["overflow"] >= 1

    with_router(pair, scenario)


def test_a_request_that_is_cancelled_after_its_choice_was_not_sent(pair: list[Replica]) -> None:
    async def scenario(router: AdapterRouter) -> None:
        request = pending(None)
        task = asyncio.ensure_future(router._choose_replica_for_request(request))
        request.future.add_done_callback(lambda _: task.cancel())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert router._lengths.of("one") + router._lengths.of("two") == 0
        first = await route(router, pending(None))
        assert router._lengths.of(first) == 1

    with_router(pair, scenario)


def test_a_replica_that_does_not_report_is_asked_whether_it_answers(pair: list[Replica]) -> None:
    pair[0].report(DIGESTS[0])
    module.reports.alive("one", time.monotonic() - 15.0)

    async def scenario(router: AdapterRouter) -> None:
        await first_choice(router, pair)
        assert [router.replica_queue_len_cache.get(replica.replica_id) for replica in pair] == [None, 0]

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
