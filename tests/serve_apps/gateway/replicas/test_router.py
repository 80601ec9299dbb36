"""Routing in Serve: which replica a request gets, who has an adapter, and what a router knows of replicas' loads."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from ray import cloudpickle
from ray.serve._private.common import RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest

from serve_apps.gateway.replicas import router as module
from serve_apps.gateway.replicas.router import (
    ROUTER_CLASS,
    AdapterRouter,
    QueueLengths,
    UnansweredPrompts,
    decisions,
    is_held,
    suspect,
)
from tests.fixtures.routed import DIGESTS, Replica, pending, route, routing


def test_serve_pickles_the_class_by_reference() -> None:
    """If it were pickled by value, as classes that the module defines are, every router would have its own counters."""
    config = RequestRouterConfig(request_router_class=ROUTER_CLASS)
    assert cloudpickle.loads(config.get_serialized_request_router_cls()) is AdapterRouter


async def test_a_holder_is_found_and_the_reasons_are_counted(pair: list[Replica]) -> None:
    pair[0].report(DIGESTS[0], on_host=(DIGESTS[2],))
    pair[1].report(DIGESTS[1])
    async with routing(pair) as router:
        assert [await route(router, pending(d)) for d in DIGESTS[:3]] == ["one", "two", "one"]
        await route(router, pending(None))
        first = await route(router, pending(DIGESTS[3]))
        assert await route(router, pending(DIGESTS[3])) == first
        await route(router, PendingRequest([], {}, RequestMetadata("c", "c", call_method="capacity")))
    counts = decisions("engine")
    assert counts["pool"] == 2
    assert counts["host"] == counts["base"] == counts["recent"] == 1
    assert counts["hash"] + counts["overflow"] == 1
    assert sum(counts.values()) == 6


async def test_reports_replace_what_was_said_before(pair: list[Replica]) -> None:
    async with routing(pair) as router:
        home = await route(router, pending(DIGESTS[0]))
        elsewhere = pair[home == "one"]
        elsewhere.report(DIGESTS[0])
        assert await route(router, pending(DIGESTS[0])) == elsewhere.replica_id.unique_id
        elsewhere.report()
        assert await route(router, pending(DIGESTS[0])) == home
        elsewhere.report(DIGESTS[0])
        module.reports.alive(elsewhere.replica_id.unique_id, time.monotonic() - 60.0)  # then it was silent
        assert await route(router, pending(DIGESTS[0])) == home


async def test_a_report_ends_what_the_router_remembers_of_an_adapter(pair: list[Replica]) -> None:
    """Once the replica has reported the adapter, only its reports say whether it still holds it."""
    async with routing(pair) as router:
        home = await route(router, pending(DIGESTS[0]))
        holder = pair[home == "two"]
        assert await route(router, pending(DIGESTS[0])) == home
        holder.report(on_host=(DIGESTS[0],))
        assert await route(router, pending(DIGESTS[0])) == home
        holder.report()
        await route(router, pending(DIGESTS[0]))
        assert [decisions("engine")[reason] for reason in ("recent", "host")] == [1, 1]
        assert module.replicas("engine") == {"one", "two"}


@pytest.mark.parametrize("http_request", [None, "shared"])
async def test_many_at_once_keep_to_their_replicas(pair: list[Replica], http_request: str | None) -> None:
    """Serve's FIFOMixin would give a replica chosen for one adapter to the request that has waited longest, and Serve
    gives all calls of one HTTP request (`n=4`, several prompts) the same internal id.
    """
    for replica, digests in zip(pair, (DIGESTS[::2], DIGESTS[1::2]), strict=True):
        replica.report(*digests)
    async with routing(pair) as router:
        routed = await asyncio.gather(*(route(router, pending(d, http_request=http_request)) for d in DIGESTS))
        assert routed == ["one", "two"] * 10


async def test_retries_pause_while_no_replica_accepts(pair: list[Replica]) -> None:
    for replica in pair:
        replica.queue_len = replica.max_ongoing_requests
    pauses: list[int] = []

    async def pause(attempt: int) -> None:
        pauses.append(attempt)
        if len(pauses) == 3:
            pair[0].queue_len = 0

    async with routing(pair) as router:
        for replica in pair:
            router.on_new_queue_len_info(replica.replica_id, replica.queue_len)
        router._backoff = pause
        assert await route(router, pending(None)) == "one"
    assert pauses == [0, 1, 2]
    assert sum(replica.num_asked for replica in pair) <= 2 * 6


async def test_a_full_replica_is_skipped(pair: list[Replica]) -> None:
    pair[0].report(DIGESTS[0])
    pair[0].queue_len = pair[0].max_ongoing_requests
    async with routing(pair) as router:
        router.on_new_queue_len_info(pair[0].replica_id, pair[0].queue_len)
        assert await route(router, pending(DIGESTS[0])) == "two"


@pytest.mark.parametrize("seen_by", ["the gateway", "Serve"])
async def test_after_a_failure_the_other_replica_is_asked(pair: list[Replica], seen_by: str) -> None:
    pair[0].report(DIGESTS[0])
    async with routing(pair) as router:
        if seen_by == "Serve":
            router.on_replica_actor_unavailable(pair[0].replica_id)
        else:
            suspect("one")
        assert await route(router, pending(DIGESTS[0])) == "two"
        assert await route(router, pending(None)) == "two"
        router.update_replicas(pair[:1])
        assert await route(router, pending(DIGESTS[0])) == "one"  # rather than not at all


async def test_without_a_request_every_replica_is_offered(pair: list[Replica]) -> None:
    async with routing(pair) as router:
        offered = await router.choose_replicas(pair)
        assert sorted(r.replica_id.unique_id for (r,) in offered) == ["one", "two"]


async def test_who_has_an_adapter_is_known_by_reports(pair: list[Replica]) -> None:
    pair[0].report(DIGESTS[0])
    pair[1].report(on_host=(DIGESTS[0], DIGESTS[1]))
    async with routing(pair) as router:
        held = [is_held("engine", besides, DIGESTS[1]) for besides in ("one", "two")]
        assert held == [True, False]
        await route(router, pending(DIGESTS[2]))
        assert not is_held("engine", "one", DIGESTS[2]), "sent, and not reported"
        router.update_replicas(pair[1:])
        assert not is_held("engine", "two", DIGESTS[0])
        assert not is_held("other", "one", DIGESTS[0])


@pytest.mark.parametrize(("at_once", "num_long"), [(1, 0), (20, 0), (20, 2)])
async def test_an_adapter_in_high_demand_overflows(pair: list[Replica], at_once: int, num_long: int) -> None:
    """Also if none of the requests has been sent when the last one gets its replica, and if Serve has forgotten the
    lengths of the queues, be they empty or not.
    """
    pair[0].report(DIGESTS[0])
    async with routing(pair) as router:
        routed: list[str] = []
        for replica in pair:
            replica.queue_len = num_long
            router.on_new_queue_len_info(replica.replica_id, num_long)
            router.replica_queue_len_cache.invalidate_key(replica.replica_id)
        while len(routed) < 20:
            routed += await asyncio.gather(*(route(router, pending(DIGESTS[0])) for _ in range(at_once)))
        assert routed.count("two") == 9  # one request more than the mean stays with the holder
        assert decisions("engine")["overflow"] >= 1


async def test_a_request_that_is_cancelled_after_its_choice_was_not_sent(pair: list[Replica]) -> None:
    async with routing(pair) as router:
        request = pending(None)
        task = asyncio.ensure_future(router._choose_replica_for_request(request))
        request.future.add_done_callback(lambda _: task.cancel())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert router._lengths.of("one") + router._lengths.of("two") == 0
        first = await route(router, pending(None))
        assert router._lengths.of(first) == 1


async def test_a_replica_that_does_not_report_is_asked_whether_it_answers(pair: list[Replica]) -> None:
    pair[0].report(DIGESTS[0])
    module.reports.alive("one", time.monotonic() - 15.0)
    async with routing(pair) as router:
        await first_choice(router, pair)
        assert [router.replica_queue_len_cache.get(replica.replica_id) for replica in pair] == [None, 0]


async def first_choice(router: AdapterRouter, replicas: list[Replica]) -> str:
    (first, *_), *_ = await router.choose_replicas(replicas, pending(DIGESTS[0]))
    return str(first.replica_id.unique_id)


async def five_are_sent(router: AdapterRouter, replica: Replica) -> None:
    """And Serve forgets the length of the queue, as it does after ten seconds."""
    await asyncio.sleep(0)
    for _ in range(5):
        router.on_send_request(replica.replica_id)
    router.replica_queue_len_cache.invalidate_key(replica.replica_id)


async def test_a_load_is_known_for_longer_than_serve_remembers_it(pair: list[Replica]) -> None:
    pair[0].report(DIGESTS[0])
    async with routing(pair) as router:
        pair[0].queue_len = 5
        router.on_new_queue_len_info(pair[1].replica_id, 0)
        await five_are_sent(router, pair[0])
        router.replica_queue_len_cache.invalidate_key(pair[1].replica_id)
        assert await first_choice(router, pair) == "two"
        for _ in range(5):
            router.decrement_queue_len_cache(pair[0].replica_id)
        assert await first_choice(router, pair) == "one"


async def test_a_broadcast_does_not_hide_requests_under_way(pair: list[Replica]) -> None:
    """`/status` is a broadcast. If Serve has forgotten the length of a queue, it counts the broadcast from 0."""
    pair[0].report(DIGESTS[0])
    async with routing(pair) as router:
        await five_are_sent(router, pair[0])
        router.on_send_request(pair[0].replica_id)
        router.decrement_queue_len_cache(pair[0].replica_id)
        assert router.replica_queue_len_cache.get(pair[0].replica_id) == 0
        assert await first_choice(router, pair) == "two"


async def test_requests_that_never_arrived_are_forgotten(pair: list[Replica]) -> None:
    """Serve reports that a request is sent, but not that it was cancelled before the replica accepted it."""
    pair[0].report(DIGESTS[0])
    async with routing(pair) as router:
        await five_are_sent(router, pair[0])
        assert await first_choice(router, pair) == "two"
        assert router._probing is not None
        await asyncio.wait_for(router._probing, timeout=10)
        assert await first_choice(router, pair) == "one"


def with_prompt(num_tokens: int) -> PendingRequest:
    made = pending(DIGESTS[0])
    made.args[0] = replace(made.args[0], prompt_ids=(1,) * num_tokens)
    return made


async def test_a_request_does_not_wait_for_a_long_prompt_of_this_gateway(pair: list[Replica]) -> None:
    pair[1].report()
    pair[0].report(DIGESTS[0])
    async with routing(pair) as router:
        long = with_prompt(5000)
        assert await route(router, long) == "one"
        assert await route(router, with_prompt(10)) == "two"
        module.answered(long.args[0].request_id)
        assert await route(router, with_prompt(10)) == "one"


async def test_a_request_that_is_refused_or_cancelled_has_no_prompt_on_a_replica(pair: list[Replica]) -> None:
    pair[1].report()
    pair[0].report(DIGESTS[0])
    async with routing(pair) as router:
        long = with_prompt(5000)
        for is_retry in (False, True):  # Serve chooses again where the replica has refused
            await router._choose_replica_for_request(long, is_retry=is_retry)
            assert sum(module._unanswered.of(r) for r in ("one", "two")) == 5000
        router.update_replicas([])
        again = asyncio.create_task(router._choose_replica_for_request(long, is_retry=True))
        await asyncio.sleep(0)
        assert not any(module._unanswered.of(r) for r in ("one", "two"))
        again.cancel()
        await asyncio.gather(again, return_exceptions=True)
        assert not any(module._unanswered.of(r) for r in ("one", "two"))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_nobody_has_ended_is_forgotten(clock: Clock) -> None:
    prompts = UnansweredPrompts(clock)
    prompts.sent("a", "one", 7)
    prompts.sent("a", "two", 7)  # again, elsewhere
    assert [prompts.of("one"), prompts.of("two")] == [0, 7]
    clock.now = 299.0
    prompts.sent("b", "two", 1)
    assert prompts.of("two") == 8
    clock.now = 301.0
    prompts.sent("c", "one", 2)
    assert [prompts.of("one"), prompts.of("two")] == [2, 1]
    prompts.answered("never sent")
    for name in "bc":
        prompts.answered(name)
    assert [prompts.of("one"), prompts.of("two")] == [0, 0]


@pytest.fixture
def lengths(clock: Clock) -> QueueLengths:
    return QueueLengths(clock)


def send(lengths: QueueLengths, request: str) -> None:
    lengths.chosen(request, "a")
    lengths.leaves(request)
    lengths.sent("a")


def answer(lengths: QueueLengths, request: str, length: int) -> None:
    lengths.heard("a", length)
    lengths.accepted(request, "a")


def test_a_request_counts_from_its_choice_to_its_end_once(lengths: QueueLengths) -> None:
    lengths.chosen("r", "a")
    assert (lengths.of("a"), lengths.known("a")) == (1, 0)
    lengths.leaves("r")
    lengths.sent("a")
    assert (lengths.of("a"), lengths.known("a")) == (1, 1)
    answer(lengths, "r", 1)
    assert lengths.of("a") == 1
    lengths.ended("a")
    lengths.ended("a")
    assert (lengths.of("a"), lengths.of("b")) == (0, 0)


def test_what_is_sent_meanwhile_is_not_in_the_length_that_the_replica_said(lengths: QueueLengths) -> None:
    for request in "rst":
        send(lengths, request)
    answer(lengths, "r", 1)
    assert lengths.of("a") == 3
    answer(lengths, "s", 2)
    answer(lengths, "t", 3)
    assert lengths.of("a") == 3
    send(lengths, "u")
    answer(lengths, "u", 9)  # others send too
    assert lengths.of("a") == 9


def test_a_request_that_is_not_sent_or_not_answered_is_forgotten(lengths: QueueLengths, clock: Clock) -> None:
    """And does not count for a later one, however soon these follow each other."""
    lengths.chosen("cancelled", "a")
    lengths.withdrawn("cancelled")
    send(lengths, "lost")
    for number in range(10):
        clock.now += 0.3
        send(lengths, f"r{number}")
        answer(lengths, f"r{number}", 1)
        lengths.ended("a")
    assert lengths.of("a") == 0


def test_a_refused_request_counts_no_more_and_others_do(lengths: QueueLengths) -> None:
    for request in "rs":
        send(lengths, request)
    lengths.heard("a", 5)
    lengths.refused("r")
    assert lengths.of("a") == 6
    lengths.chosen("r", "b")
    lengths.leaves("r")
    assert (lengths.of("a"), lengths.of("b")) == (6, 0)
    answer(lengths, "s", 6)
    assert lengths.of("a") == 6


def test_a_request_that_is_sent_again_is_the_last_again(lengths: QueueLengths, clock: Clock) -> None:
    """Otherwise those behind it stay as long as it does."""
    send(lengths, "r")
    clock.now = 0.2
    send(lengths, "lost")
    clock.now = 0.9
    lengths.heard("a", 0)
    lengths.refused("r")
    send(lengths, "r")
    clock.now = 1.5
    lengths.heard("a", 0)
    assert lengths.of("a") == 1


def test_a_probe_adds_what_is_under_way(lengths: QueueLengths, clock: Clock) -> None:
    for request in "rstu":
        send(lengths, request)
    lengths.probed("a", 1)
    assert lengths.of("a") == 5
    answer(lengths, "r", 2)
    assert lengths.of("a") == 5
    clock.now = 2.0
    lengths.probed("a", 1)
    assert lengths.of("a") == 1


def test_replicas_that_are_gone_are_forgotten(lengths: QueueLengths) -> None:
    send(lengths, "r")
    lengths.chosen("s", "a")
    lengths.retain({"b"})
    assert lengths.of("a") == 1
    lengths.leaves("s")
    assert lengths.of("a") == 0
