"""Prompts without a first token, as the gateway that has sent them counts them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from ray.serve.request_router import PendingRequest

from serve_apps.gateway.replicas import router as module
from serve_apps.gateway.replicas.router import AdapterRouter, UnansweredPrompts
from tests.serve_apps.gateway.routed import DIGESTS, Replica, pending, route, with_router

NAMES = ("prompts-one", "prompts-two")


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Replica]]:
    """Two; the first holds an adapter."""
    monkeypatch.setattr(module, "_unanswered", UnansweredPrompts())
    pair = [Replica(name) for name in NAMES]
    for replica in pair:
        replica.report()
    pair[0].report(DIGESTS[0])
    yield pair
    module._placed.clear()


def with_prompt(num_tokens: int) -> PendingRequest:
    made = pending(DIGESTS[0])
    made.args[0] = replace(made.args[0], prompt_ids=(1,) * num_tokens)
    return made


def test_a_request_does_not_wait_for_a_long_prompt_of_this_gateway(replicas: list[Replica]) -> None:
    async def scenario(router: AdapterRouter) -> None:
        long = with_prompt(5000)
        assert await route(router, long) == "prompts-one"
        assert await route(router, with_prompt(10)) == "prompts-two"
        module.answered(long.args[0].request_id)
        assert await route(router, with_prompt(10)) == "prompts-one"

    with_router(replicas, scenario)


def test_a_request_that_is_refused_or_cancelled_has_no_prompt_on_a_replica(replicas: list[Replica]) -> None:
    async def scenario(router: AdapterRouter) -> None:
        long = with_prompt(5000)
        for is_retry in (False, True):  # Serve chooses again where the replica has refused
            await router._choose_replica_for_request(long, is_retry=is_retry)
            assert sum(module._unanswered.of(r) for r in NAMES) == 5000
        router.update_replicas([])
        again = asyncio.create_task(router._choose_replica_for_request(long, is_retry=True))
        await asyncio.sleep(0)
        assert not any(module._unanswered.of(r) for r in NAMES)
        again.cancel()
        await asyncio.gather(again, return_exceptions=True)
        assert not any(module._unanswered.of(r) for r in NAMES)

    with_router(replicas, scenario)


def test_what_nobody_has_ended_is_forgotten() -> None:
    now = [0.0]
    prompts = UnansweredPrompts(lambda: now[0])
    prompts.sent("a", "one", 7)
    prompts.sent("a", "two", 7)  # again, elsewhere
    assert [prompts.of("one"), prompts.of("two")] == [0, 7]
    now[0] = 299.0
    prompts.sent("b", "two", 1)
    assert prompts.of("two") == 8
    now[0] = 301.0
    prompts.sent("c", "one", 2)
    assert [prompts.of("one"), prompts.of("two")] == [2, 1]
    prompts.answered("never sent")
    for name in "bc":
        prompts.answered(name)
    assert [prompts.of("one"), prompts.of("two")] == [0, 0]
