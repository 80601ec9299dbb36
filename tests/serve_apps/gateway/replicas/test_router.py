"""Routing in Serve: which replica a request gets, who has an adapter, and what a router knows of replicas' loads."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private.common import RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest

from loray.policy.prefixes import told_names
from loray.spec import PoolingParams, SamplingParams
from serve_apps.gateway.replicas import router as module
from serve_apps.gateway.replicas.router import (
    ROUTER_CLASS,
    AdapterRouter,
    OwnRequests,
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


async def test_a_prompt_goes_where_its_prefix_is(pair: list[Replica]) -> None:
    said = tuple(range(400))
    pair[0].report(DIGESTS[0])
    async with routing(pair) as router:
        assert await route(router, pending(DIGESTS[0], prompt=said)) == "one"
        pair[0].report()
        pair[1].report(DIGESTS[0])
        next_turn = (*said, *range(30))
        assert await route(router, pending(DIGESTS[0], prompt=next_turn)) == "one"  # sent there a moment ago
        other = tuple(range(1000, 1400))
        pair[1].report(prefixes=told_names(DIGESTS[0], other[:320], 16))
        pair[0].report(DIGESTS[0])
        assert await route(router, pending(DIGESTS[0], prompt=other)) == "two"
        assert await route(router, pending(None, prompt=other)) == "two"  # it has fewer requests
        third = tuple(range(2000, 2400))
        pair[0].report(prefixes=told_names(None, third, 16))
        assert await route(router, pending(None, prompt=third)) == "one"
    assert decisions("engine")["prefix"] == 3
    tokens = {name: module.own.tokens(name) for name in ("one", "two")}
    assert tokens == {"one": 400 + (430 - 384) + (400 - 384), "two": (400 - 320) + 400}


@pytest.mark.parametrize(
    "whole", [{"pooling": PoolingParams(kind="mean")}, {"params": SamplingParams(prompt_logprobs=0)}]
)
async def test_who_has_its_whole_prompt_computed_goes_where_the_adapter_is(
    pair: list[Replica], whole: dict[str, Any]
) -> None:
    said = tuple(range(400))
    async with routing(pair) as router:
        pair[0].report(DIGESTS[0])
        pair[1].report(prefixes=told_names(DIGESTS[0], said, 16))
        asked = pending(DIGESTS[0], prompt=said)
        asked.args[0] = replace(asked.args[0], **whole)
        assert await route(router, asked) == "one"
    assert module.own.tokens("one") == 400


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
    lengths of the queues, whether other gateways have requests there or not.
    """
    pair[0].report(DIGESTS[0])
    pair[1].report()
    async with routing(pair) as router:
        routed: list[str] = []
        for replica in pair:
            module.reports.loaded(str(replica.replica_id.unique_id), num_long, time.monotonic())
            router.replica_queue_len_cache.invalidate_key(replica.replica_id)
        while len(routed) < 20:
            routed += await asyncio.gather(*(route(router, pending(DIGESTS[0])) for _ in range(at_once)))
        assert routed.count("two") == 9  # one request more than the mean stays with the holder
        assert decisions("engine")["overflow"] >= 1


async def test_a_request_that_has_ended_is_nowhere_though_a_router_chooses_for_it(pair: list[Replica]) -> None:
    async with routing(pair) as router:
        request = pending(None)
        name = await route(router, request)
        assert module.own.num(name) == 1
        module.own.end(request.args[0].request_id)
        await router.choose_replicas(pair, request)
        router.on_request_routed(request, pair[0].replica_id, None)
        assert module.own.num("one") + module.own.num("two") == 0


async def test_a_replica_that_does_not_report_is_asked_whether_it_answers(pair: list[Replica]) -> None:
    pair[0].report(DIGESTS[0])
    module.reports.alive("one", time.monotonic() - 15.0)
    async with routing(pair) as router:
        await first_choice(router, pair)
        assert [router.replica_queue_len_cache.get(replica.replica_id) for replica in pair] == [None, 0]


async def first_choice(router: AdapterRouter, replicas: list[Replica]) -> str:
    (first, *_), *_ = await router.choose_replicas(replicas, pending(DIGESTS[0]))
    return str(first.replica_id.unique_id)


async def test_a_load_is_known_for_longer_than_serve_remembers_it(pair: list[Replica]) -> None:
    pair[0].report(DIGESTS[0])
    async with routing(pair) as router:
        sent = [pending(DIGESTS[0]) for _ in range(5)]
        for request in sent:
            module.own.accepted(request.args[0].request_id, "one")
        for replica in pair:
            router.replica_queue_len_cache.invalidate_key(replica.replica_id)
        assert await first_choice(router, pair) == "two"
        for request in sent:
            module.own.end(request.args[0].request_id)
        assert await first_choice(router, pair) == "one"


async def test_requests_of_other_gateways_count(pair: list[Replica]) -> None:
    pair[0].report(DIGESTS[0])
    pair[1].report()
    async with routing(pair) as router:
        module.reports.loaded("one", 9, time.monotonic())
        pair[0].report(DIGESTS[0], DIGESTS[1])
        assert await first_choice(router, pair) == "two"
        module.reports.loaded("one", 0, time.monotonic())
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
        module.own.answered(long.args[0].request_id)
        assert await route(router, with_prompt(10)) == "one"


async def test_each_request_of_a_call_counts(pair: list[Replica]) -> None:
    pair[1].report()
    pair[0].report(DIGESTS[0])
    before = decisions("engine")["pool"]
    async with routing(pair) as router:
        asked, *others = with_prompt(100), with_prompt(100), with_prompt(100)
        asked.args += [None, 1, [(other.args[0], 2 + i) for i, other in enumerate(others)]]
        assert await route(router, asked) == "one"
        names = [one.args[0].request_id for one in (asked, *others)]
        assert (module.own.num("one"), module.own.tokens("one")) == (3, 300)
        assert [module.own.replica_of(name) for name in names] == ["one"] * 3
        assert decisions("engine")["pool"] - before == 3
        for name in names:
            module.own.end(name)


async def test_a_request_that_is_refused_is_on_one_replica_alone(pair: list[Replica]) -> None:
    pair[1].report()
    pair[0].report(DIGESTS[0])
    async with routing(pair) as router:
        long = with_prompt(5000)
        for is_retry in (False, True):  # Serve chooses again where the replica has refused
            await router._choose_replica_for_request(long, is_retry=is_retry)
            assert sum(module.own.tokens(r) for r in ("one", "two")) == 5000
            assert sum(module.own.num(r) for r in ("one", "two")) == 1
        module.own.end(long.args[0].request_id)
        assert not any(module.own.tokens(r) or module.own.num(r) for r in ("one", "two"))


def test_a_request_counts_from_its_choice_to_its_end_once() -> None:
    own = OwnRequests()
    own.begin("r")
    own.place("r", "one", 7)
    assert (own.num("one"), own.tokens("one"), own.replica_of("r")) == (1, 7, None)
    own.accepted("r", "two")  # which Serve has chosen instead
    assert (own.num("one"), own.tokens("one")) == (0, 0)
    assert (own.num("two"), own.tokens("two"), own.replica_of("r")) == (1, 7, "two")
    own.answered("r")
    assert (own.num("two"), own.tokens("two")) == (1, 0)
    own.accepted("r", "two")  # told late
    assert own.tokens("two") == 0
    own.place("other", "two", 3)  # which has not begun
    own.answered("other")
    for _ in range(2):
        own.end("r")
    assert (own.num("two"), own.tokens("two"), own.replica_of("r")) == (0, 0, None)
